"""python -m edm kernel install: a Jupyter kernel, tried with Jupyter's own client."""

import json
import os
import sys

import pytest
from conftest import has_ended, needs_userfaultfd, wait_for

pytestmark = needs_userfaultfd

INSTALL = (sys.executable, "-m", "edm", "kernel", "install")
SPACE = "import edm, os, numpy as np; space = edm.space(); print(os.getpid(), space.figures()['pager_pid'])"
SUM = """
def total(name):
    a = np.zeros(8_000_000)  # of a limit of 16 MiB
    a[::512] = 1
    print(name, space.start_addr <= a.ctypes.data < space.end_addr, a.sum())
"""


class Notebook:
    """A kernel, and a client of it."""

    def __init__(self, manager):
        self.manager = manager
        manager.start_kernel()
        self.client = manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def cell(self, code):
        """Run a cell; what it prints, or the name of its exception."""
        printed = []

        def hook(message):
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=60, output_hook=hook)["content"]
        return reply["ename"] if reply["status"] == "error" else "".join(printed)

    def pids(self):
        """Of the kernel, and of its pager; what a cell needs is imported."""
        return [int(pid) for pid in self.cell(SPACE).split()]


@pytest.fixture
def notebook(run, tmp_path, monkeypatch):
    pytest.importorskip("numpy")
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("jupyter_client")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    ended = install(run, tmp_path / "data", "--name", "edm-test", "--resident", "16M")
    assert ended.returncode == 0, ended.stdout
    manager = client.KernelManager(kernel_name="edm-test")
    try:
        yield Notebook(manager)
    finally:
        manager.shutdown_kernel(now=True)


def test_arrays_of_any_cell_thread_and_task_live_in_the_space(notebook):
    notebook.pids()
    notebook.cell(SUM)
    assert notebook.cell("total('cell')") == "cell True 15625.0\n"
    thread = (
        "import threading; t = threading.Thread(target=total, args=['thread']); t.start(); t.join()"
    )
    assert notebook.cell(thread) == "thread True 15625.0\n"
    task = "import asyncio\nasync def work(): total('task')\nawait asyncio.create_task(work())"
    assert notebook.cell(task) == "task True 15625.0\n"


def test_interrupt_restart_and_shutdown_are_as_with_any_kernel(notebook):
    before = notebook.pids()
    notebook.cell("a = np.ones(8_000_000)")
    notebook.client.execute("while True: a += 1", stop_on_error=False)  # or the next is not run
    wait_for(lambda: notebook.client.get_iopub_msg(timeout=30)["content"].get("code"))
    notebook.manager.interrupt_kernel()
    assert notebook.client.get_shell_msg(timeout=60)["content"]["ename"] == "KeyboardInterrupt"
    assert notebook.pids() == before
    assert notebook.cell("print(bool((a[:1] >= 1).all()))") == "True\n"

    notebook.manager.restart_kernel()
    notebook.client.wait_for_ready(timeout=60)
    wait_for(lambda: all(map(has_ended, before)))
    restarted = notebook.pids()
    assert not set(restarted) & set(before)
    assert notebook.cell("a") == "NameError"

    notebook.manager.shutdown_kernel()
    wait_for(lambda: all(map(has_ended, restarted)))


# ---------------------------------------------------------------- the kernel spec


def install(run, folder, *options):
    """Run the command for a user whose Jupyter has its files in this folder."""
    return run("/usr/bin/env", f"JUPYTER_DATA_DIR={folder}", *INSTALL, *options)


def test_a_kernel_is_edm_run_with_the_options_that_were_given(run, tmp_path):
    pytest.importorskip("ipykernel")
    ended = install(run, tmp_path, "--resident", "8G", "--name", "large", "--stats")
    folder = tmp_path / "kernels" / "large"
    assert (ended.returncode, ended.stdout) == (0, f"kernel large: {folder}\n")
    spec = json.loads((folder / "kernel.json").read_text())
    assert spec["argv"] == [
        sys.executable, "-m", "edm", "run", "--resident", "8G", "--stats", "-m",
        "ipykernel_launcher", "-f", "{connection_file}",
    ]  # fmt: skip
    assert (spec["display_name"], spec["language"]) == ("Python 3 (large)", "python")
    assert install(run, tmp_path, "--name", "large").returncode == 0  # it is replaced


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--resident", "12X"], "resident: '12X' is not a size"),
        (["--dms", "1"], "dms: needs MPI ranks"),
        (["--nowhere"], "--nowhere"),
        ([__file__], "not only options of python -m edm run"),
        (["--name", "my kernel"], "my kernel"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(run, tmp_path, options, told):
    pytest.importorskip("ipykernel")
    ended = install(run, tmp_path, *options)
    assert ended.returncode == 2 and told in ended.stdout, ended.stdout
    assert ended.stdout.count("\n") == 1 and not list(tmp_path.rglob("kernel.json")), ended.stdout


def test_without_ipykernel_it_says_so(run, tmp_path):
    (tmp_path / "ipykernel.py").write_text("raise ImportError('No module named ipykernel')")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    ended = run("/usr/bin/env", f"PYTHONPATH={path}", *INSTALL)
    assert ended.returncode == 2 and "error: No module named ipykernel" in ended.stdout, (
        ended.stdout
    )
    assert ended.stdout.count("\n") == 1, ended.stdout
