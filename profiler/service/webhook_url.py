"""The URL of a webhook, checked without what sends: HTTP and TLS are not loaded into a sampler."""

from urllib.parse import SplitResult, urlsplit

PORTS = {"http": 80, "https": 443}


class WebhookError(ValueError):
    """Text that is not the URL of a webhook, or a command that cannot be run."""


def parse_webhook(url: str) -> SplitResult:
    """Return the parts of the URL of a webhook.

    Raises:
        WebhookError: it is not one; the message does not repeat it, as it may hold a secret.
    """
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not url.isascii() or not url.isprintable() or " " in url:
        raise WebhookError("a webhook is named by its URL: http://HOST/PATH or https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise WebhookError("the URL of a webhook must not have a user or password in it")
    return parts
