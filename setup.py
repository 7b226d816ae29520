"""Every value lives in settings.ini; edit there, not here."""

import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
EXTRAS = ("train", "peers", "dashboard", "schedule", "dev")


class BuildWithNotebooks(build_py):
    """A wheel carries the run notebooks too: `mkrich train` executes them where there is no clone."""

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / cfg["lib_path"] / "notebooks"
        target.mkdir(parents=True, exist_ok=True)
        notebooks = ROOT / cfg["nbs_path"] / "pages"
        for notebook in sorted(notebooks.glob("*.ipynb")):
            shutil.copy2(notebook, target)


setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Developers"],
    python_requires=f">={cfg['min_python']}",
    packages=setuptools.find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={
        cfg["lib_path"]: [
            "py.typed",
            "models/recipes/*.yaml",
            "market/sample/*",
            "core/migrations/**",
            "dashboard/template/**",
            "schedule/engine/*.py",
            "api/templates/**",
            "runs/templates/**",
        ]
    },
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={name: shlex.split(cfg[f"{name}_requirements"]) for name in EXTRAS},
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
)
