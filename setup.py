"""Installs edm.pth beside the package. setup.cfg can't, and has all the rest.

In the picture: nothing. `python -m edm` looks in the current folder first, where a program may have a module
called edm, or types, which Python's runpy imports. Only Python's site comes before that, which runs the lines
of .pth files.

While Python looks for the module of -m, sys.argv[0] is "-m". The word before the module's arguments is its name,
or an option that ends with it: -medm, -Omedm.

Source: "site" and "-m" in Python's documentation.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        # The folder whose files get into the wheel; with pip install -e it is that of "install".
        install = self.get_finalized_command("install")
        self.copy_file("edm.pth", install.install_lib if self.editable_mode else self.build_lib)


# With script_name, setuptools does not take this file for a module of the package.
setup(script_name="setup.py", cmdclass={"build_py": BuildPy})
