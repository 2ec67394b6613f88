"""Starts EDM in the interpreter that runs the user's program, before the program begins.

In the picture: the first thing that happens in the application. `python -m edm run` (launch.py) puts
this folder first on PYTHONPATH, and Python's site imports what is called sitecustomize.

Interface: the environment variable EDM_RUN, from launch.py, and edm.edm.start. There is nothing here
for other modules to import.

Rules: the program finds what plain Python gives it. So this module
  - removes itself from the environment and from sys.path, and leaves sys.modules["sitecustomize"] to
    the user's own;
  - takes what EDM imports out of sys.modules again. A module of that name beside the script is then
    the one that the program gets. If the program would get the same file, Finder gives it the same
    module: there is one `ctypes`, one `logging`, and one `edm` in the process, as always.
EDM imports nothing after that: an import would find the program's modules.

Sources: site, importlib and sys.meta_path in Python's documentation; importlib/_bootstrap.py, where
an import that ends looks into sys.modules again.
"""

import builtins
import marshal
import os
import sys

before = set(sys.modules)
imports = {}  # {name of a module: the import statements that it has executed}
plain_import = builtins.__import__


def recorded(name, globals=None, locals=None, fromlist=(), level=0):
    statement = name, globals, None, fromlist, level
    imports.setdefault((globals or {}).get("__name__"), []).append(statement)
    return plain_import(*statement)


builtins.__import__ = recorded
import contextlib
import importlib.util

EDM = os.path.dirname(os.path.dirname(__file__))


class Finder:
    """Finds for the program what has been loaded for EDM. It is first on sys.meta_path."""

    def __init__(self, loaded, use_numpy):
        self._loaded = loaded  # {name: module}; what the program has imported is no longer in it
        self._use_numpy = use_numpy  # what to do after numpy was imported

    def find_spec(self, name, path=None, target=None):
        module = self._loaded.get(name)
        if module is None and name != "numpy":
            return None
        finders = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        spec = next(filter(None, (f.find_spec(name, path, target) for f in finders)), None)
        if spec is None and name == "edm":
            spec = edm_spec()  # it was found on a path of the launcher only
        if spec is None or spec.loader is None:
            return spec
        if module is None:
            spec.loader = Loader(spec.loader, None, self._numpy_is_imported)
        elif folder(spec) == folder(module.__spec__):
            spec.loader = Loader(spec.loader, module, self._give)
        return spec

    def _give(self, module):
        given = module.__name__
        self._loaded.pop(given, None)
        for name in [name for name in self._loaded if name.startswith(given + ".")]:
            spec = getattr(self._loaded[name], "__spec__", None)
            if spec is None or spec.name != name:  # such as importlib's _bootstrap: put there by it
                sys.modules[name] = self._loaded.pop(name)
        # inspect, typing and others look into sys.modules for what the module has imported.
        for statement in imports.pop(given, ()):
            with contextlib.suppress(ImportError):  # it has done without
                parent = __import__(*statement).__name__
                for name in statement[3] or ():  # from parent import name
                    if f"{parent}.{name}" in self._loaded:
                        __import__(f"{parent}.{name}")

    def _numpy_is_imported(self, module):
        if hasattr(module, "ndarray"):  # else it is the program's own, and only called numpy
            self._use_numpy()


class Loader:
    """In place of another loader, for one import: a module that is loaded already, or more to do."""

    def __init__(self, loader, module, action):
        self._loader, self._module, self._action = loader, module, action

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._module or self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        if self._module is None:
            self._loader.exec_module(module)
        self._action(module)


def folder(spec):
    # Python that was started in EDM's folder finds edm.py there, and not __init__.py.
    return os.path.realpath(os.path.dirname(spec.origin or ""))


def edm_spec():
    init = os.path.join(EDM, "__init__.py")
    return importlib.util.spec_from_file_location("edm", init, submodule_search_locations=[EDM])


def start():
    """Start EDM as launch.py said, and hide it from the program."""
    settings = marshal.loads(bytes.fromhex(os.environ.pop("EDM_RUN")))
    if settings["PYTHONPATH"] is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = settings["PYTHONPATH"]
    own = os.path.dirname(__file__)
    sys.path.remove(own)
    sys.path_importer_cache.pop(own, None)

    spec = edm_spec()
    sys.modules["edm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["edm"])
    import edm.edm
    import edm.numpy_mem_handler

    builtins.__import__ = plain_import
    try:
        space = edm.edm.start(edm.edm.Config(**settings["config"]))
    except (ValueError, OSError) as error:
        print(f"python -m edm run: error: {error}", file=sys.stderr)
        os._exit(2)
    allocators = []  # kept for ever: threads and exit functions make arrays after the script's end

    def use_numpy():
        threshold = settings["numpy_threshold"]
        if threshold is not None and not allocators:
            allocators.append(edm.numpy_mem_handler.numpy_allocator(space, threshold))
            allocators[0].__enter__()

    if "numpy" in sys.modules:
        use_numpy()
    loaded = {name: sys.modules.pop(name) for name in set(sys.modules) - before}
    sys.meta_path.insert(0, Finder(loaded, use_numpy))


try:
    start()
except Exception:  # noqa: BLE001 - site would go on, without EDM
    sys.excepthook(*sys.exc_info())
    os._exit(1)
# The user's own, or else ImportError, which site expects. This one is not found any more.
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: F401
