"""S3: objects in a bucket of Amazon or of any server with its protocol. The only user of boto3.

Needs PUT with If-None-Match, GET with ranges, ListObjectsV2 and DELETE; `replace` also needs PUT
with If-Match, which is tried once before it is relied on. Credentials come from the usual AWS
variables and files. botocore bounds retries and time-outs; an error that remains becomes one line
that says what to do. A response is accepted only if an object store sent it: a proxy's login page
must not count as a stored profile.

The tag of an object is its ETag.
"""

import base64
import contextlib
import functools
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import boto3
from botocore import exceptions
from botocore.config import Config

from storage.objects.keys import (
    LARGEST_OBJECT_BYTES,
    NS_PER_S,
    ObjectMissing,
    ObjectTooLarge,
    StoredObject,
    StoreRefused,
    StoreUnavailable,
    check_key,
    check_range,
)

CONNECTIONS = 16
"""Connections that are kept open for the next request; each is opened when a thread needs it."""

_TIMEOUT_S = 30.0
_CONFIG = {
    "connect_timeout": 5,
    "max_pool_connections": CONNECTIONS,
    # Two attempts with botocore's jittered pause; the uploader retries after longer ones.
    "retries": {"mode": "standard", "total_max_attempts": 2},
}

_CORRECT = "correct --store or --s3-endpoint"
_RIGHTS = "allow s3:PutObject, s3:GetObject, s3:DeleteObject and s3:ListBucket"
_CLOCK = ("this machine's clock is wrong", "set the time, with chrony for example")
_REGION = ("the bucket is in another region", "set AWS_DEFAULT_REGION")
_REFUSALS = {
    "SignatureDoesNotMatch": ("the secret key is wrong", "check AWS_SECRET_ACCESS_KEY"),
    "InvalidAccessKeyId": ("the access key is unknown", "check AWS_ACCESS_KEY_ID"),
    "ExpiredToken": ("the credentials have expired", "renew them"),
    "InvalidToken": ("the session token is not valid", "check AWS_SESSION_TOKEN"),
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "NoSuchBucket": ("there is no such bucket", "create it, or correct --store"),
    "InvalidBucketName": ("this cannot be a bucket's name", "correct --store"),
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "AccessDenied": ("the credentials lack a permission", _RIGHTS),
    "NotImplemented": (
        "it cannot do that",
        "use a server that knows If-None-Match and, for `compact`, If-Match",
    ),
}
"""By S3's error code: the problem and the remedy."""
_NOT_A_STORE = "the response is not an object store's (is there a proxy in between?)"
_STATUS_CODES = {301: "PermanentRedirect", 401: "AccessDenied", 403: "AccessDenied"}
"""Responses without a body, as to HEAD, have only a status."""

_NO_TAG = "0" * 32
"""A tag that no object has."""
_WRITE_ID = "everflame-write"
"""Metadata of an object that is replaced: which call wrote it."""


class _NotAStoreError(Exception):
    """Something else than an object store has sent a response."""


class S3Store:
    """Objects in a bucket, below a prefix. Opening it sends no request.

    Raises:
        StoreRefused: the bucket's name or the endpoint is not valid.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint: str | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self.requests: Counter[str] = Counter()
        """Requests sent, by S3's name of the operation, as `GetObject`; each attempt counts."""
        self._counting = threading.Lock()
        self._opened_as = (bucket, prefix, endpoint, timeout_s)
        self._bucket = bucket
        self._is_proved = False
        """The last object that was sent is stored for certain."""
        self._knows_tags = False
        """The server is known to heed If-Match."""
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._place = f"s3://{bucket}/{self._prefix}" + (f" at {endpoint}" if endpoint else "")
        # Servers other than Amazon's rarely have a host name per bucket: buckets are paths.
        style = "path" if endpoint else "auto"
        config = Config(s3={"addressing_style": style}, read_timeout=timeout_s, **_CONFIG)
        if not bucket:
            raise StoreRefused(f"cannot open {self._place}: it has no bucket", _CORRECT)
        try:
            with self._explaining("open", ""):
                # Not the default session: it would not read credentials again.
                session = boto3.session.Session()
                # boto3 makes clients at run time, so they have no type.
                self._client: Any = session.client(
                    "s3",
                    endpoint_url=endpoint,
                    region_name=session.region_name or "us-east-1",
                    config=config,
                )
                events = self._client.meta.events
                events.register("before-send.s3", self._count)
                events.register("after-call.s3", _check_response)
                events.register("before-call.s3.HeadBucket", _forbid_redirect)
        except ValueError as error:
            raise StoreRefused(f"cannot open {self._place}: {error}", _CORRECT) from error

    def __str__(self) -> str:
        return self._place

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the store for itself, once however often it is sent there."""
        return _opened_here, self._opened_as

    def put(self, key: str, content: bytes) -> bool:
        name = self._name(key)
        with self._explaining("write", key):
            try:
                self._send(name, content, IfNoneMatch="*")
            except exceptions.ClientError as error:
                if _status(error) in {409, 412}:
                    return self._explain_conflict(key, name)
                raise
        return True

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        name = self._name(key)
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": f'"{tag}"'}
        write_id = os.urandom(16).hex()
        with self._explaining("write", key):
            self._ensure_knows_tags(key)
            try:
                return self._send(name, content, Metadata={_WRITE_ID: write_id}, **condition)
            except exceptions.ClientError as error:
                if not _is_conflict(error):
                    raise
                if error.response.get("ResponseMetadata", {}).get("RetryAttempts"):
                    return self._find_own(name, write_id)
                return None

    def _send(self, name: str, content: bytes, **options: Any) -> str:
        """Put an object; return its tag.

        Raises:
            ClientError: the server refuses, also because of a condition among the options.
            _NotAStoreError: it is not certain that an object store has it.
        """
        checksum = base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()
        was_proved, self._is_proved = self._is_proved, False
        response = self._client.put_object(
            Bucket=self._bucket,
            Key=name,
            Body=content,
            ContentType="application/octet-stream",
            ChecksumCRC32=checksum,
            **options,
        )
        told = response.get("ChecksumCRC32")
        if not response.get("ETag") or told not in {None, checksum}:
            raise _NotAStoreError
        if told is None and not was_proved:
            self._check_stored(name, content, response)
        self._is_proved = True
        return _tag(response)

    def _ensure_knows_tags(self, key: str) -> None:
        """Refuse a server that ignores If-Match, as many did until 2024: changes would be lost.

        It is sent one PUT that it must refuse, once per process, to a name beside `key`, where the
        same rights apply. Servers learned If-None-Match first, so that is not tried.

        Raises:
            StoreRefused: it has written the object.
        """
        if self._knows_tags:
            return
        name = self._name(f"{key}.probe")
        try:
            self._send(name, b"probe", IfMatch=f'"{_NO_TAG}"')
        except exceptions.ClientError as error:
            if not _is_conflict(error):
                raise
            self._knows_tags = True
            return
        with contextlib.suppress(exceptions.ClientError):
            self._client.delete_object(Bucket=self._bucket, Key=name)
        raise StoreRefused(
            f"cannot replace {key!r} in {self._place}: it ignores If-Match, so that one writer "
            "would undo what another one has just written",
            "use a server that knows If-Match (Amazon's, MinIO and SeaweedFS 4 do)",
        )

    def _find_own(self, name: str, write_id: str) -> str | None:
        """Return an object's tag if this call wrote it; None if another one did, or it is gone.

        The first attempt's response may have been lost: then the second one meets the first's
        object. Two writers' contents may be equal, so they do not tell.
        """
        try:
            found = self._client.head_object(Bucket=self._bucket, Key=name)
        except exceptions.ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return _tag(found) if found.get("Metadata", {}).get(_WRITE_ID) == write_id else None

    def _check_stored(self, name: str, content: bytes, response: Any) -> None:
        """Ask for an object that a server says it has stored, without repeating its checksum.

        Older servers do not, and neither does something in between that says yes to everything.
        Asked once after a start and after each failure.

        Raises:
            _NotAStoreError: it has another one, or none.
        """
        try:
            found = self._client.head_object(Bucket=self._bucket, Key=name)
        except exceptions.ClientError as error:
            # Write-only credentials cannot ask: then only the headers tell a store from a page.
            if _status(error) == 403 and response["ResponseMetadata"].get("RequestId"):
                return
            if _status(error) == 404:
                raise _NotAStoreError from error
            raise
        if (found.get("ETag"), found.get("ContentLength")) != (response["ETag"], len(content)):
            raise _NotAStoreError

    def get(self, key: str) -> bytes:
        name = self._name(key)
        with self._explaining("read", key):
            return self._read(Key=name)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        name = self._name(key)
        with self._explaining("read", key):
            return self._read(Key=name)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        name = self._name(key)
        with self._explaining("read", key):
            try:
                last = start + length - 1
                content, _ = self._read(Key=name, Range=f"bytes={start}-{last}")
            except exceptions.ClientError as error:
                if _status(error) == 416:  # the object ends before `start`
                    return b""
                raise
        if len(content) > length:
            raise StoreUnavailable(f"cannot read {key!r} in {self._place}: it ignores ranges")
        return content

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket,
            Prefix=self._prefix + prefix,
            **({"StartAfter": self._prefix + start_after} if start_after else {}),
        )
        pages = iter(pages)
        while True:
            with self._explaining("list", prefix):
                try:
                    page = next(pages, None)
                    listed = None if page is None else self._listed(page)
                except (KeyError, ValueError, RuntimeError) as error:
                    # The library takes the numbers and times of a listing for valid ones.
                    raise _NotAStoreError from error
            if listed is None:
                return
            yield from listed

    def _listed(self, page: Any) -> Sequence[StoredObject]:
        """Return the objects of a page.

        Raises:
            _NotAStoreError: it is not one. A page of HTML would look like an empty listing.
        """
        if page["IsTruncated"] and not page.get("NextContinuationToken"):
            raise _NotAStoreError
        return [
            StoredObject(
                each["Key"][len(self._prefix) :],
                each["Size"],
                int(each["LastModified"].timestamp()) * NS_PER_S,
                _tag(each),
            )
            for each in page.get("Contents", ())
        ]

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._explaining("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def _name(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _read(self, **request: str) -> tuple[bytes, str]:
        """Return the content and the tag."""
        response = self._client.get_object(Bucket=self._bucket, **request)
        if not response.get("ETag"):
            raise StoreUnavailable(f"cannot read {self._place}: {_NOT_A_STORE}")
        body = response["Body"]
        if response.get("ContentLength", 0) > LARGEST_OBJECT_BYTES:
            body.close()
            raise ObjectTooLarge(request["Key"])
        content: bytes = body.read()  # in one go, as only that checks its length
        return content, _tag(response)

    def _count(self, event_name: str, **_: object) -> None:
        with self._counting:
            self.requests[event_name.rpartition(".")[2]] += 1

    def _explain_conflict(self, key: str, name: str) -> bool:
        """Return False if the object exists; 409 may also mean a concurrent delete or put."""
        try:
            if not self._client.head_object(Bucket=self._bucket, Key=name).get("ETag"):
                raise _NotAStoreError
        except exceptions.ClientError as error:
            if _status(error) == 403:
                return False  # write-only credentials cannot ask
            if _status(error) != 404:
                raise
            raise StoreUnavailable(
                f"cannot write {key!r} in {self._place}: it says the object exists, but has none"
            ) from error
        return False

    @contextlib.contextmanager
    def _explaining(self, verb: str, key: str) -> Iterator[None]:
        what = f"cannot {verb} {key!r} in {self._place}" if key else f"cannot {verb} {self._place}"
        try:
            yield
        except exceptions.ClientError as error:
            raise _explain(what, error) from error
        except (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
        ) as error:
            raise StoreRefused(
                f"{what}: there are no usable credentials",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
            ) from error
        except exceptions.ProfileNotFound as error:
            raise StoreRefused(f"{what}: {error}", "correct AWS_PROFILE") from error
        except exceptions.ParamValidationError as error:
            reason = " ".join(str(error).split())
            raise StoreRefused(f"{what}: {reason}", _CORRECT) from error
        except _NotAStoreError as error:
            raise StoreUnavailable(f"{what}: {_NOT_A_STORE}") from error
        except (RecursionError, MemoryError) as error:  # redirects without end, XML without end
            raise StoreUnavailable(f"{what}: {_NOT_A_STORE}") from error
        except (exceptions.BotoCoreError, exceptions.HTTPClientError) as error:
            reason = " ".join(str(error).split())
            raise StoreUnavailable(f"{what}: {reason}") from error


@functools.lru_cache(maxsize=8)
def _opened_here(bucket: str, prefix: str, endpoint: str | None, timeout_s: float) -> S3Store:
    return S3Store(bucket, prefix, endpoint, timeout_s)


def _check_response(http_response: Any, model: Any, **_: object) -> None:
    """Refuse a web page that a proxy or a captive portal sends as a success, whatever its headers.

    S3 never sends one, and nothing at all in response to an object that it has stored.
    """
    kind = http_response.headers.get("content-type", "")
    is_page = kind.lower().startswith("text/html")
    is_success = http_response.status_code < 300
    if is_success and (is_page or (model.name == "PutObject" and http_response.content)):
        raise _NotAStoreError


def _forbid_redirect(context: dict[str, Any], **_: object) -> None:
    """Let botocore's own question for a bucket's region, after a redirect, not be redirected.

    It asks again for each redirect until the stack is full (botocore 1.44, S3RegionRedirectorv2).
    """
    context["s3_redirect"]["redirected"] = True


def _tag(response: Any) -> str:
    """Return the ETag of an object as HEAD, GET, PUT and listings have it, without its quotes."""
    return str(response.get("ETag", "")).removeprefix("W/").strip('"')


def _is_conflict(error: exceptions.ClientError) -> bool:
    """Return whether an object is not as a PUT's condition says.

    Amazon answers 404 to If-Match where there is no object, 409 while another request goes on.
    """
    code = error.response.get("Error", {}).get("Code")
    return code == "NoSuchKey" or _status(error) in {409, 412}


def _status(error: exceptions.ClientError) -> int:
    metadata = error.response.get("ResponseMetadata", {})
    return int(metadata.get("HTTPStatusCode", 0))


def _explain(
    what: str, error: exceptions.ClientError
) -> StoreRefused | StoreUnavailable | ObjectMissing:
    details = error.response.get("Error", {})
    status = _status(error)
    code = str(details.get("Code", ""))
    if code == "NoSuchKey":
        return ObjectMissing(f"{what}: there is no such object")
    if code not in _REFUSALS:
        code = _STATUS_CODES.get(status, code)
    if code in _REFUSALS:
        reason, remedy = _REFUSALS[code]
        return StoreRefused(f"{what}: {reason}", remedy)
    if 300 <= status < 400:
        return StoreUnavailable(f"{what}: it answered {status}, and {_NOT_A_STORE}")
    message = " ".join(str(details.get("Message", "")).split())[:200]
    return StoreUnavailable(f"{what}: it answered {status} {code} {message}".rstrip())
