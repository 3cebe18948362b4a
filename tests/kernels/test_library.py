"""How the native library is found and refused, and which kernels serve under which name."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels.native_linear import native, random_case
from tiered.errors import ConfigError
from tiered.kernels import KERNEL_NAMES, Kernels, Level, Library, kernels, reference
from tiered.kernels.library import ABI_VERSION
from tiered.quant import GroupScheme


def compiled(folder: Path, source: str) -> Path:
    """A small library made of `source`; skips where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is installed")
    path, code = folder / "libtiered_kernels.so", folder / "small.cpp"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", str(code), "-o", str(path)], check=True)
    return path


def refusal_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Library(path)
    return str(caught.value)


def test_a_missing_library_is_refused_with_what_the_build_wrote(tmp_path: Path) -> None:
    path = tmp_path / "libtiered_kernels.so"
    (tmp_path / "libtiered_kernels.so.refusal").write_text("no C++ compiler: neither g++ nor clang++ is in PATH\n")
    assert refusal_of(path) == (
        "libtiered_kernels.so was not built: no C++ compiler: neither g++ nor clang++ is in PATH"
    )


def test_a_library_that_no_build_was_run_for_says_so(tmp_path: Path) -> None:
    assert "the package's build has not been run" in refusal_of(tmp_path / "libtiered_kernels.so")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libtiered_kernels.so"
    path.write_bytes(b"no ELF header")
    assert "libtiered_kernels.so cannot be used" in refusal_of(path)


def test_a_library_of_another_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    other = ABI_VERSION + 41
    path = compiled(tmp_path, f'extern "C" int tk_abi_version() {{ return {other}; }}')
    refusal = refusal_of(path)
    assert f"version {other}" in refusal and f"expected {ABI_VERSION}" in refusal and "install tiered again" in refusal


def test_a_library_without_a_version_is_refused(tmp_path: Path) -> None:
    path = compiled(tmp_path, 'extern "C" int something_else() { return 0; }')
    assert "tk_abi_version" in refusal_of(path)


def test_the_name_torch_computes_with_the_reference() -> None:
    case = random_case(GroupScheme(4), out=7, units=3, rows=2)
    with Kernels(2, name="torch") as torch_kernels:
        assert torch_kernels.level is None and torch_kernels.refusal is not None
        found = torch_kernels.linear(case.x, case.weight)
    assert torch.equal(found, reference.linear(case.x, case.weight))


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        Kernels(1, name="sse2")
    assert "'sse2'" in str(caught.value) and all(name in str(caught.value) for name in KERNEL_NAMES)


def test_auto_takes_the_best_level_and_tells_it() -> None:
    library = native()
    with Kernels(1) as chosen:
        assert chosen.level is library.best_level() and chosen.refusal is None
    better = [level for level in Level if level > library.best_level()]
    assert all(library.refusal(level) is not None for level in better)


def test_a_level_that_this_machine_lacks_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native()
    monkeypatch.setattr(Library, "refusal", lambda self, level: f"the processor has no {level.name}")
    monkeypatch.setattr(kernels, "load_library", lambda: library)
    with pytest.raises(ConfigError, match=r"kernels 'avx512': the processor has no AVX512; name another"):
        Kernels(1, name="avx512")


def test_a_level_that_does_not_exist_is_refused() -> None:
    library = native()
    for level in (-1, len(Level)):
        assert library.tk_refusal(level) == b"there is no such level"
        assert library.tk_create(1, level) is None


def test_without_a_library_auto_falls_back_and_a_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_library", lambda: "libtiered_kernels.so was not built: no compiler")
    case = random_case(GroupScheme(8), out=7, units=3, rows=2)
    with Kernels(1) as fallen_back:
        assert fallen_back.refusal == "libtiered_kernels.so was not built: no compiler"
        expected = reference.linear(case.x, case.weight)
        assert torch.equal(fallen_back.linear(case.x, case.weight), expected)
    with pytest.raises(ConfigError, match="was not built: no compiler"):
        Kernels(1, name="avx2")


def test_closed_kernels_fall_back_to_the_reference() -> None:
    native()
    case = random_case(GroupScheme(4), out=7, units=3, rows=2)
    closed = Kernels(1)
    closed.close()
    closed.close()
    assert closed.refusal == "closed"
    assert torch.equal(closed.linear(case.x, case.weight), reference.linear(case.x, case.weight))


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_an_impossible_number_of_threads_is_refused(threads: int) -> None:
    native()
    with pytest.raises(ConfigError, match="could not be started"):
        Kernels(threads)
