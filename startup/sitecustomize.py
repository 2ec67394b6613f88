"""Starts EDM in the interpreter that runs the user's program, before the program begins.

In the picture: the first thing that happens in the application. `python -m edm run` (launch.py) puts
this folder first on PYTHONPATH, and Python's site imports the module sitecustomize.

Interface: the environment variable EDM_RUN, from launch.py. Nothing here is for other modules to import.

Rules: the program finds what plain Python gives it. So this module removes itself from the environment
and from sys.path, and imports the user's own sitecustomize in its place. It removes all modules that EDM
has imported from sys.modules: EDM keeps using them, and the program imports its own copies. Only
`import edm` gives the program the EDM that was started. EDM imports nothing after that, as an import
would find the program's modules.

Sources: site, importlib and sys.meta_path in Python's documentation; importlib/_bootstrap.py.
"""

import marshal
import os
import sys

before = set(sys.modules)
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location

EDM = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def start():
    """Start EDM as launch.py said, and hide it from the program."""
    settings = marshal.loads(bytes.fromhex(os.environ.pop("EDM_RUN")))
    del os.environ["PYTHONPATH"]
    if settings["PYTHONPATH"] is not None:
        os.environ["PYTHONPATH"] = settings["PYTHONPATH"]
    spec = spec_from_file_location("edm", f"{EDM}/__init__.py")
    sys.modules["edm"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["edm"])
    import edm.numpy_mem_handler  # and so edm.edm

    try:
        space = edm.edm.start(edm.edm.Config(**settings["config"]))
    except (ValueError, OSError) as error:
        edm.edm.tell(f"python -m edm run: error: {error}")
        os._exit(2)

    def use_numpy():
        # Not before it has arrays: a module without them is only called numpy. And once, whichever threads import
        # parts of it.
        has_arrays = hasattr(sys.modules.get("numpy"), "ndarray")
        if has_arrays and (threshold := settings.pop("threshold", None)) is not None:
            # For ever: threads and exit functions make arrays after the script's end.
            edm.numpy_mem_handler.handler().use(space).thresholds[0] = threshold

    def find_spec(name, path=None, target=None):
        if name.startswith("numpy."):  # NumPy imports many of its modules when it has arrays
            use_numpy()
        if name == "edm":
            # None: only the launcher's path has EDM. Its folder is compared, as a Python that was started there
            # finds edm.py instead of __init__.py.
            found = PathFinder.find_spec(name)
            if found is None or os.path.realpath(os.path.dirname(found.origin or "")) == EDM:
                return spec

    use_numpy()
    imported = {name: sys.modules.pop(name) for name in set(sys.modules) - before}
    of_edm = {name: imported[name] for name in imported if name.partition(".")[0] == "edm"}
    spec.loader.create_module = lambda spec: edm
    spec.loader.exec_module = lambda module: sys.modules.update(of_edm)
    # It is asked for each module that the program imports.
    sys.meta_path.insert(0, type("Finder", (), {"find_spec": find_spec}))


sys.path.remove(os.path.dirname(__file__))
if "EDM_RUN" in os.environ:  # else this is a subinterpreter: its sys.path begins as the main one's
    try:
        start()
    except Exception:  # noqa: BLE001 - site would go on, without EDM
        sys.excepthook(*sys.exc_info())
        os._exit(1)
# The user's own, or ImportError, which site expects. This module is not found any more.
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: F401
