import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.runtimes.python_modules import module_of


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("/usr/lib/python3.11/json/decoder.py", "json.decoder"),
        ("/usr/lib/python3.11/json/__init__.py", "json"),
        ("/usr/lib/python3.11/queue.py", "queue"),
        ("/usr/local/lib/python3.14t/asyncio/events.py", "asyncio.events"),
        ("/usr/lib64/python3.9/os.py", "os"),
        ("/usr/lib/python3.11/lib-dynload/extra.py", "extra"),
        ("/usr/lib/python3/dist-packages/apt/cache.py", "apt.cache"),
        ("/opt/venv/lib/python3.12/site-packages/numpy/core/_methods.py", "numpy.core._methods"),
        ("/opt/venv/lib/python3.12/site-packages/six.py", "six"),
        ("/opt/venv/lib/python3.12/site-packages/pip/__main__.py", "pip.__main__"),
        ("/x/site-packages/a/_vendor/site-packages/b/c.py", "b.c"),
        ("/x/site-packages/größe/é.py", "größe.é"),
        ("/x/site-packages/demo-1.0-py3.8.egg/demo/run.py", "demo.run"),
        ("/srv/shop.zip/shop/models.py", "shop.models"),
        ("/usr/bin/tool.pyz/__main__.py", "__main__"),
        ("/usr/lib/python311.zip/json/decoder.py", "json.decoder"),
        ("requests/sessions.py", "requests.sessions"),
    ],
)
def test_module_below_a_root_of_packages_has_its_dotted_name(file, module):
    """The nearest root counts; what lies below it is as `import` says it."""
    assert module_of(file) == module


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("/x/site-packages/jedi/third-party/stubs/time.py", "stubs.time"),
        ("/x/site-packages/my-tool/run.py", "run"),
        ("/x/site-packages/my-tool/__init__.py", "__init__"),
    ],
)
def test_directory_that_cannot_be_a_package_ends_the_name(file, module):
    """A directory whose name is no identifier is not imported by name, nor what is above it."""
    assert module_of(file) == module


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("/app/shop/models.py", "shop.models"),
        ("/app/src/shop/models.py", "shop.models"),
        ("/app/main.py", "main"),
        ("/usr/src/app/shop/views.py", "shop.views"),
        ("/var/task/handler.py", "handler"),
        ("/app/.venv/lib/python3.12/site-packages/flask/app.py", "flask.app"),
    ],
)
def test_programs_in_containers_are_below_their_conventional_roots(file, module):
    """What an image has in /app is taken as packages from there."""
    assert module_of(file) == module


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("/home/ada/projects/shop/models.py", "models"),
        ("/home/ada/projects/shop/__init__.py", "shop"),
        ("/home/ada/projects/shop/__main__.py", "shop.__main__"),
        ("/home/ada/my-shop/__main__.py", "__main__"),
        ("/srv/python3.11/shop/models.py", "models"),
        ("/application/shop/models.py", "models"),
        ("./tools/run.py", "run"),
        ("../tools/run.py", "run"),
    ],
)
def test_elsewhere_only_the_file_is_certain(file, module):
    """No directory is taken as a package where none can be told from those above it."""
    assert module_of(file) == module


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("<frozen importlib._bootstrap>", "importlib._bootstrap"),
        ("<frozen posixpath>", "posixpath"),
        ("<frozen a b>", "<frozen a b>"),
        ("<string>", "<string>"),
        ("<stdin>", "<stdin>"),
        ("<attrs generated init shop.Order>", "<attrs generated init shop.Order>"),
        ("/usr/bin/pip3.11", "pip3.11"),
        ("/app/templates/index.html", "index.html"),
        ("/usr/bin/tool.v2.py", "tool.v2.py"),
        ("/home/ada/run-it.py", "run-it"),
        ("/x/site-packages/a/very/long…", ""),
        ("", ""),
    ],
)
def test_what_is_no_module_keeps_the_name_the_interpreter_has(file, module):
    """Only frozen modules are unwrapped; a name that was cut says nothing."""
    assert module_of(file) == module


@given(
    st.text(max_size=40) | st.lists(st.sampled_from(["", "lib", "a", "-", "x.py"])).map("/".join)
)
def test_any_text_has_a_module_no_longer_than_itself(file):
    """Nothing raises, and no name is made up."""
    assert len(module_of(file)) <= len(file)
