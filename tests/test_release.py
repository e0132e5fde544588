"""What a release is made of: one version, a source distribution that has it all, a workflow."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest
import tomllib
import yaml

import dicache

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [p for p in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if p.stem != "config"]

in_a_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no checkout"
)
published_files = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no .github")


def test_the_version_is_one():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == "Unreleased"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert headings[1] == str(citation["version"]) == dicache.__version__
    assert "version" in PROJECT["project"]["dynamic"]
    assert citation["license"] == PROJECT["project"]["license"]


@in_a_checkout
def test_a_source_distribution_has_all_that_git_has(tmp_path):
    """But for what only a checkout needs, and it says its version."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    tracked -= {name for name in tracked if name.endswith(".safetensors")}  # large
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "dicache" / "kernels").symlink_to("../kernels/triton")
    (tmp_path / "tests" / "stray.so").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=tmp_path,
        env={"DICACHE_BUILD": "0", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "dist" / f"dicache-{dicache.__version__}.tar.gz") as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {name for name in tracked - names if not name.startswith((".git", ".github/"))} == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("home", ["", "https://example.org/us/dicache"])
def test_an_index_gets_no_link_and_no_picture_that_it_cannot_follow(home, tmp_path):
    """An index shows the README without the files beside it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("dicache/__init__.py", "dicache/kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    menu = re.sub("^repo_url:.*", "", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    (tmp_path / "mkdocs.yml").write_text(menu + (f"repo_url: {home}/\n" if home else ""))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"],
        cwd=tmp_path,
        env={"DICACHE_BUILD": "0", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metadata = message_from_string((tmp_path / "dicache.egg-info" / "PKG-INFO").read_text())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert "# dicache" in text and "the whole table" in text
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    led_here = {t.partition("/HEAD/")[2].partition("#")[0] for t in targets if "/HEAD/" in t}
    assert all((ROOT / name).exists() for name in led_here)
    picture = f"]({home}/raw/HEAD/docs/images/demo-flux.png)"
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert addresses["Paper"] in (ROOT / "CITATION.cff").read_text()
    if home:
        assert picture in text and {"docs/families.md", "CONTRIBUTING.md"} <= led_here
        assert addresses["Repository"] == home and len(addresses) == 4
    else:
        assert "![" not in text and not led_here and len(addresses) == 1


@published_files
def test_the_workflow_runs_what_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    ran, pythons = "", set()
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            pythons |= set(matrix.get("python", []))
            for step in job["steps"]:
                ran += step.get("run", "") + "\n"
                pythons.add(step.get("with", {}).get("python-version", ""))
    called = set(re.findall(r"^make (?:-C \w+ )?([a-z-]+)", ran, flags=re.M))
    assert called and called <= targets
    files = re.findall(r"(?:tests|\.ci)/\S+", ran)
    assert files and all((ROOT / name).is_file() for name in files)
    assert {"3.10", "3.11", "3.12", "3.13"} <= pythons
    assert PROJECT["project"]["requires-python"] == ">=3.10"


def imported(path: Path) -> set[str]:
    """Top-level names that a test file imports, and what its neighbours that it imports do."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    neighbours = [path.with_name(f"{name}.py") for name in names]
    return names.union(*(imported(each) for each in neighbours if each.is_file()))


@published_files
def test_tests_of_the_library_alone_need_no_more_than_it_installs():
    """Those that the workflow runs where diffusers cannot be installed."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = "\n".join(step.get("run", "") for step in jobs["library"]["steps"])
    files = re.findall(r"tests/test_\w+\.py", steps)
    installed = set(re.findall(r"[a-z]\w+", steps.partition("--no-build-isolation")[0]))
    for name in [*files, "tests/conftest.py"]:
        foreign = {
            each
            for each in imported(ROOT / name) - set(sys.stdlib_module_names) - {"dicache"}
            if not (ROOT / "tests" / f"{each}.py").is_file()
        }
        assert foreign <= installed, name
    assert len(files) >= 5


@published_files
@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_what_a_report_needs(form):
    fields = yaml.safe_load(form.read_text())
    assert fields["name"] and fields["description"]
    asked = {
        field["id"]: field for field in fields["body"] if field["type"] in ("input", "textarea")
    }
    assert "dicache info" in asked["info"]["attributes"]["label"]
    assert all(field["validations"]["required"] for field in asked.values())
    said = " ".join(str(field["attributes"]) for field in asked.values())
    assert ".to_dict()" in said
