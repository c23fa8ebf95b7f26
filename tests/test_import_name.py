"""The import name `mmpretrain` belongs to OpenMMLab's distribution, too: the two are never imported mixed."""

import subprocess
import sys
from pathlib import Path

import pytest

import mmpretrain

OURS = Path(mmpretrain.__file__).parent


def import_beside(installed: Path, name: str, first: bool = True) -> subprocess.CompletedProcess:
    """Import this package, copied into `installed` or from where it is, beside a distribution's metadata `name`."""
    installed.mkdir(parents=True)
    if name:
        (installed / name).mkdir()
    if first:
        (installed / "mmpretrain").mkdir()
        (installed / "mmpretrain" / "__init__.py").write_text((OURS / "__init__.py").read_text())
    code = f"import sys; sys.path[:0] = {[str(OURS.parent), str(installed)][first:]!r}; import mmpretrain; print(mmpretrain.__version__)"
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=installed.parent, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["mmpretrain-1.2.0.dist-info", "mmpretrain-1.2.0-py3.11.egg-info", "mmpretrain.egg-link"])
@pytest.mark.parametrize("inside", [True, False])
def test_another_distribution_of_the_name_is_one_clear_error(name: str, inside: bool, tmp_path: Path) -> None:
    """Both in one folder, as pip leaves them; and the other installed while this package is imported from its sources."""
    done = import_beside(tmp_path / "site-packages", name, first=inside)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: two distributions share the import name mmpretrain")
    assert str(tmp_path / "site-packages" / name) in error
    assert "pip uninstall mmpretrain" in error


@pytest.mark.parametrize("name", ["", "mmpretrain_clip-0.1.0.dist-info", "mmpretrain_extras-1.0.dist-info", "mmpretrain.pth"])
def test_other_names_are_nobody_elses(name: str, tmp_path: Path) -> None:
    done = import_beside(tmp_path / "site-packages", name)
    assert done.stdout.strip() == mmpretrain.__version__, done.stderr


def test_the_look_costs_less_than_a_millisecond() -> None:
    """Of this environment, whatever it holds: the median of repeated looks."""
    import statistics
    import time

    times = []
    for _ in range(50):
        start = time.perf_counter()
        mmpretrain._refuse_a_second_distribution()
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 1e-3
