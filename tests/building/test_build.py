"""What the build decides: toolkit, architectures, FORCE_CUDA, and its words. Nothing compiles."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from cbam_ext.building import compile, decisions, jit
from cbam_ext.building.decisions import BuildError, CudaPlan, Toolkit

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n' ;;
  --dryrun) echo '#$ _HERE_={home}/bin' >&2 ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str = "13.0", library: str = "lib64") -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that answers questions."""
    write_script(home / "bin" / "nvcc", NVCC.format(version=version, home=home))
    for file in ("include/cuda_runtime.h", f"{library}/libcudart_static.a"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    return home


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """Stands for /usr/local on a machine without CUDA."""
    folder = tmp_path / "usual"
    folder.mkdir()
    return folder


class TestToolkit:
    def test_cuda_home(self, tmp_path: Path, nowhere: Path) -> None:
        home = make_toolkit(tmp_path / "cuda", "12.8")
        toolkit, _ = decisions.find_toolkit({"CUDA_HOME": str(home)}, nowhere)
        assert toolkit is not None
        assert (toolkit.home, toolkit.version, toolkit.major) == (home, "12.8", 12)
        assert toolkit.include == home / "include"
        assert toolkit.library == home / "lib64"

    def test_cuda_home_decides_alone(self, tmp_path: Path, nowhere: Path) -> None:
        make_toolkit(nowhere / "cuda")
        toolkit, missing = decisions.find_toolkit({"CUDA_HOME": str(tmp_path / "wrong")}, nowhere)
        assert toolkit is None
        assert missing == f"CUDA_HOME={tmp_path / 'wrong'} has no bin/nvcc"

    def test_wrapper_script_on_path(self, tmp_path: Path, nowhere: Path) -> None:
        home = make_toolkit(tmp_path / "somewhere" / "cuda")
        nvcc = write_script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        toolkit, _ = decisions.find_toolkit({"PATH": str(nvcc.parent)}, nowhere)
        assert toolkit is not None
        assert toolkit.home == home

    def test_link_on_path_to_a_silent_nvcc(self, tmp_path: Path, nowhere: Path) -> None:
        home = make_toolkit(tmp_path / "cuda")
        text = NVCC.format(version="13.0", home="").replace("--dryrun", "--nothing")
        write_script(home / "bin" / "nvcc", text)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
        toolkit, _ = decisions.find_toolkit({"PATH": str(tmp_path / "bin")}, nowhere)
        assert toolkit is not None
        assert toolkit.home == home

    def test_usual_places_newest_first(self, nowhere: Path) -> None:
        make_toolkit(nowhere / "cuda-9.2", "9.2")
        make_toolkit(nowhere / "cuda-12.8", "12.8")
        toolkit, _ = decisions.find_toolkit({}, nowhere)
        assert toolkit is not None
        assert toolkit.version == "12.8"

    @pytest.mark.parametrize("file", ["include/cuda_runtime.h", "lib64/libcudart_static.a"])
    def test_incomplete_is_named(self, tmp_path: Path, nowhere: Path, file: str) -> None:
        home = make_toolkit(tmp_path / "cuda")
        (home / file).unlink()
        toolkit, missing = decisions.find_toolkit({"CUDA_PATH": str(home)}, nowhere)
        assert toolkit is None
        assert str(home) in missing
        assert Path(file).name in missing

    def test_incomplete_one_is_passed_over(self, tmp_path: Path, nowhere: Path) -> None:
        incomplete = make_toolkit(tmp_path / "cuda", "12.0")
        (incomplete / "include" / "cuda_runtime.h").unlink()
        make_toolkit(nowhere / "cuda", "13.0")
        toolkit, _ = decisions.find_toolkit({"PATH": str(incomplete / "bin")}, nowhere)
        assert toolkit is not None
        assert toolkit.version == "13.0"

    def test_nothing(self, nowhere: Path) -> None:
        toolkit, missing = decisions.find_toolkit({}, nowhere, [])
        assert toolkit is None
        assert "no nvcc on PATH" in missing

    def test_from_pip_newest_first(self, tmp_path: Path, nowhere: Path) -> None:
        """As NVIDIA's packages lay it; torch brings the libraries, without a compiler."""
        packages = tmp_path / "site-packages"
        (packages / "nvidia" / "cu14" / "lib").mkdir(parents=True)
        for name, version in (("cu9", "9.2"), ("cu12", "12.9"), ("cu13", "13.5")):
            make_toolkit(packages / "nvidia" / name, version, "lib")
        toolkit, _ = decisions.find_toolkit({}, nowhere, [tmp_path / "none", packages])
        assert toolkit is not None
        assert (toolkit.version, toolkit.library) == ("13.5", packages / "nvidia" / "cu13" / "lib")

    def test_the_system_comes_before_pip(self, tmp_path: Path, nowhere: Path) -> None:
        make_toolkit(tmp_path / "nvidia" / "cu13", "13.5")
        make_toolkit(nowhere / "cuda", "12.8")
        toolkit, _ = decisions.find_toolkit({}, nowhere, [tmp_path])
        assert toolkit is not None
        assert toolkit.version == "12.8"

    def test_folders_of_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the process, of its interpreter where pip hides them from it, of the active one."""
        active = tmp_path / "venv" / "lib" / "python3.12" / "site-packages"
        active.mkdir(parents=True)
        monkeypatch.setattr(sys, "path", ["", str(tmp_path / "overlay")])
        folders = decisions.package_folders({"VIRTUAL_ENV": str(tmp_path / "venv")})
        assert folders[0] == tmp_path / "overlay"
        assert Path(sysconfig.get_path("purelib")) in folders
        assert active in folders

    @pytest.mark.parametrize("named", [True, False])
    def test_too_old_is_refused(self, tmp_path: Path, nowhere: Path, named: bool) -> None:
        """11.8 compiles, and what it makes computes wrong gradients."""
        old = make_toolkit(tmp_path / "cuda", "11.8")
        env = {"CUDA_HOME": str(old)} if named else {"PATH": str(old / "bin")}
        toolkit, missing = decisions.find_toolkit(env, nowhere, [])
        assert toolkit is None
        assert "is CUDA 11.8, and 12.0 or newer is needed (11.8 miscompiles" in missing
        make_toolkit(nowhere / "cuda", "12.0")
        toolkit, _ = decisions.find_toolkit(env, nowhere, [])
        assert (toolkit is None) == named


class TestPlan:
    def plan(self, cuda: str | None, usual: Path, **env: str) -> decisions.CudaPlan:
        return decisions.plan_cuda("2.14.1", cuda, env, usual, [])

    def test_fitting_toolkit(self, nowhere: Path) -> None:
        make_toolkit(nowhere / "cuda", "13.1")
        plan = self.plan("13.0", nowhere)
        assert plan.toolkit is not None
        assert plan.archs == ("7.5", "8.0", "9.0", "10.0+PTX")

    @pytest.mark.parametrize(
        ("cuda", "toolkit"), [("12.8", "13.0"), ("13.2", "12.8"), ("13.0", "13.5")]
    )
    def test_the_cuda_of_torch_does_not_matter(
        self, nowhere: Path, cuda: str, toolkit: str
    ) -> None:
        """Its headers are used, not its runtime; and it is not the torch that will run."""
        make_toolkit(nowhere / "cuda", toolkit)
        plan = self.plan(cuda, nowhere)
        assert plan.toolkit is not None
        assert plan.toolkit.version == toolkit

    def test_no_toolkit(self, nowhere: Path) -> None:
        plan = self.plan("13.0", nowhere)
        assert plan.toolkit is None
        assert plan.reason.startswith("no CUDA toolkit was found (no nvcc on PATH")
        assert "pip install nvidia-cuda-nvcc nvidia-cuda-cccl" in plan.remedy
        assert '"cbam_ext[cuda]"' in plan.remedy
        assert "CUDA_HOME" in plan.remedy
        assert "\n" not in plan.reason + plan.remedy
        with pytest.raises(BuildError) as error:
            self.plan("13.0", nowhere, FORCE_CUDA="1")
        assert str(error.value) == f"FORCE_CUDA=1, but {plan.reason}. To mend it, {plan.remedy}."

    def test_torch_without_cuda(self, nowhere: Path) -> None:
        make_toolkit(nowhere / "cuda")
        plan = self.plan(None, nowhere)
        assert plan.toolkit is None
        assert plan.reason == "torch 2.14.1 is a build without CUDA"
        assert "FORCE_CUDA=1" in plan.remedy
        assert self.plan(None, nowhere, FORCE_CUDA="1").toolkit is not None

    def test_force_cuda_0(self, nowhere: Path) -> None:
        make_toolkit(nowhere / "cuda")
        assert self.plan("13.0", nowhere, FORCE_CUDA="0").toolkit is None

    def test_force_cuda_nonsense(self, nowhere: Path) -> None:
        with pytest.raises(BuildError, match="FORCE_CUDA=yes is not understood: use 0, 1"):
            self.plan("13.0", nowhere, FORCE_CUDA="yes")


@pytest.mark.parametrize(
    ("jobs", "cores", "threads"),
    [
        *(("1", 8, 1), ("2", 8, 1), ("4", 8, 2), ("64", 8, 3)),
        *(("", 1, 1), ("", 2, 2), ("", 4, 2), ("many", 64, 3)),
    ],
)
def test_architectures_at_once(
    jobs: str, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MAX_JOBS bounds what the two big sources take together; without it, the machine does."""
    monkeypatch.setattr(compile.os, "cpu_count", lambda: cores)
    found = compile._threads_per_source(("7.5", "8.0", "9.0+PTX"), {"MAX_JOBS": jobs})
    assert found == threads


class TestArchs:
    KNOWN = ("7.5", "8.0", "8.6", "9.0", "10.0", "10.3", "12.0")

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
            ("8.0 9.0a", ("8.0", "9.0a")),
            ("Ampere;8.6+PTX;hopper", ("8.0", "8.6+PTX", "9.0+PTX")),
            ("", ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ],
    )
    def test_list(self, wanted: str, expected: tuple[str, ...]) -> None:
        assert decisions.cuda_archs(self.KNOWN, {"TORCH_CUDA_ARCH_LIST": wanted}) == expected

    @pytest.mark.parametrize(
        "capability",
        [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)],
        ids=str,
    )
    def test_defaults_have_machine_code_for(self, capability: tuple[int, int]) -> None:
        assert decisions.arch_covers(decisions.DEFAULT_ARCHS, capability)

    def test_nvcc_newer_than_the_defaults(self) -> None:
        assert decisions.cuda_archs(("14.0", "15.0"), {}) == ("15.0+PTX",)

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ("sm_80", "'sm_80' is not an architecture"),
            ("5.0", "cannot make code for 5.0; it knows"),
        ],
    )
    def test_bad_list(self, wanted: str, message: str) -> None:
        with pytest.raises(BuildError, match=message):
            decisions.cuda_archs(self.KNOWN, {"TORCH_CUDA_ARCH_LIST": wanted})

    def test_gencode(self) -> None:
        assert decisions.gencode_flags(("8.0", "9.0a", "10.0+PTX")) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_100,code=compute_100",
        ]

    @pytest.mark.parametrize(
        ("archs", "capability", "covered"),
        [
            (("8.0",), (8, 6), True),
            (("8.6",), (8, 0), False),
            (("8.0",), (9, 0), False),
            (("8.0+PTX",), (9, 0), True),
            (("9.0a",), (9, 0), True),
            (("10.0a",), (10, 3), False),
            (("8.0", "9.0+PTX"), (7, 5), False),
            (("7.5", "12.0+PTX"), (12, 1), True),
        ],
    )
    def test_covers(
        self, archs: tuple[str, ...], capability: tuple[int, int], covered: bool
    ) -> None:
        assert decisions.arch_covers(archs, capability) is covered


class TestSources:
    def test_the_list_is_the_folder(self) -> None:
        listed = [decisions.sources(library) for library in ("cpu", "cuda")]
        present = [f for f in decisions.source_dir().rglob("*") if f.suffix in (".cpp", ".cu")]
        assert all(len(files) == len(set(files)) for files in listed)  # two libraries may share one
        assert {file for files in listed for file in files} == set(present)

    def test_hash_follows_the_contents(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decisions, "source_dir", lambda: tmp_path)
        (tmp_path / "sources.txt").write_text("cpu a.cpp\n")
        (tmp_path / "a.cpp").write_text("int a;")
        first = decisions.source_hash()
        (tmp_path / "notes.swp").write_text("an editor's file")
        assert decisions.source_hash() == first
        (tmp_path / "a.cpp").write_text("int b;")
        assert decisions.source_hash() != first

    def test_hash_follows_every_source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a compiler reads is never stale: all that lies there, but what is for people."""
        folder = tmp_path / "csrc"
        shutil.copytree(decisions.source_dir(), folder)
        monkeypatch.setattr(decisions, "source_dir", lambda: folder)
        first = decisions.source_hash()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            path.write_bytes(content + b"\n")
            assert (decisions.source_hash() == first) == (path.suffix == ".md"), path
            path.write_bytes(content)
        assert decisions.source_hash() == first


class TestJit:
    """What a build that is kept is kept for."""

    @pytest.fixture
    def folder(self) -> Path:
        return jit.cache_dir(CudaPlan(None, (), ""))

    @pytest.mark.parametrize(("variable", "value"), [("CXXFLAGS", "-march=native"), ("CXX", "cc")])
    def test_environment(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
    ) -> None:
        assert jit.cache_dir(CudaPlan(None, (), "another reason")) == folder
        monkeypatch.setenv(variable, value)
        assert jit.cache_dir(CudaPlan(None, (), "")) != folder

    @pytest.mark.parametrize(
        ("owner", "name", "value"),
        [
            (decisions, "source_hash", lambda: "another"),
            (decisions, "CXX_FLAGS", ("-O0",)),
            (decisions, "NVCC_FLAGS", ("-O0",)),
            (torch, "__version__", "2.99.0"),
            (torch.version, "cuda", "99.0"),
            (sys.implementation, "cache_tag", "cpython-399"),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_surroundings(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, value: object
    ) -> None:
        monkeypatch.setattr(owner, name, value)
        assert jit.cache_dir(CudaPlan(None, (), "")) != folder

    def test_toolkit_and_architectures(self, folder: Path, tmp_path: Path) -> None:
        older, newer = (Toolkit(tmp_path, v, tmp_path, tmp_path) for v in ("13.0", "13.1"))
        plans = [(older, ("8.0",)), (newer, ("8.0",)), (older, ("8.0+PTX",))]
        folders = {jit.cache_dir(CudaPlan(toolkit, archs, "")) for toolkit, archs in plans}
        assert len(folders | {folder}) == 4


class TestEarlierBuild:
    """What one left is not to be loaded, or packed, with a build without CUDA."""

    @pytest.mark.parametrize("mode", ["inplace", "editable_mode", "neither"])
    def test_it_goes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        monkeypatch.setattr(compile, "__file__", str(tmp_path / "cbam_ext/building/compile.py"))
        folders = [tmp_path / "lib" / "cbam_ext", tmp_path / "cbam_ext"]
        left = [
            folder / name for folder in folders for name in ("libcbam_cuda.so", "build_info.json")
        ]
        for file in left:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        command = compile.build_command(CudaPlan(None, (), ""))(Distribution())
        command.build_lib, command.extensions = str(tmp_path / "lib"), []
        if mode != "neither":
            setattr(command, mode, True)
        command.run()
        kept = mode == "neither"
        assert [file.exists() for file in left] == [False, False, kept, kept]


class TestFacts:
    """What a build decided is beside its libraries, where the diagnostics find it."""

    def test_why_there_is_no_cuda(self, tmp_path: Path) -> None:
        plan = CudaPlan(None, (), "no nvcc", "get one")
        command = compile.build_command(plan)(Distribution())
        command.build_lib, command.extensions = str(tmp_path), []
        (tmp_path / "cbam_ext").mkdir()
        (tmp_path / "cbam_ext" / "libcbam_cpu.so").touch()
        command.run()
        facts = json.loads((tmp_path / "cbam_ext" / "build_info.json").read_text())
        assert facts["without_cuda_because"] == "no nvcc"
        assert facts["cuda"] is None
        assert facts["source_hash"] == decisions.source_hash()

    def test_an_editable_build_keeps_its_objects(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compile, "__file__", str(tmp_path / "cbam_ext/building/compile.py"))
        command = compile.build_command(CudaPlan(None, (), ""))(Distribution())
        command.build_lib, command.extensions = str(tmp_path), []
        command.editable_mode = True
        usual = Distribution().get_command_obj("build")
        usual.ensure_finalized()
        command.run()
        assert Path(command.build_temp) == Path(usual.build_temp)


class TestRequirements:
    def test_present(self) -> None:
        compile.check_requirements()

    def test_torch_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            BuildError, match=r'pip install "torch>=2.10" && pip install --no-build'
        ):
            compile.check_requirements()

    @pytest.mark.parametrize(
        ("package", "version", "command"),
        [
            ("torch", "2.9.1+cpu", 'pip install -U "torch>=2.10"'),
            ("setuptools", "65.5.0", 'pip install -U "setuptools>=77"'),
        ],
    )
    def test_too_old(
        self, monkeypatch: pytest.MonkeyPatch, package: str, version: str, command: str
    ) -> None:
        versions = {"torch": "2.14.1", "setuptools": "80.0", package: version}
        monkeypatch.setattr(compile.importlib.metadata, "version", versions.__getitem__)
        with pytest.raises(BuildError) as error:
            compile.check_requirements()
        assert f"{package} {version} is too old" in str(error.value)
        assert command in str(error.value)

    def test_no_compiler(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"no C\+\+ compiler.*apt install g\+\+"):
            compile.find_compiler({"PATH": str(tmp_path)})
        with pytest.raises(BuildError, match=r"CXX=g\+\+-99 does not exist"):
            compile.find_compiler({"PATH": str(tmp_path), "CXX": "g++-99 -m64"})

    def test_compiler_from_environment(self, tmp_path: Path) -> None:
        write_script(tmp_path / "mycxx", "#!/bin/sh\n")
        assert compile.find_compiler({"PATH": str(tmp_path), "CXX": "mycxx -m64"}) == "mycxx -m64"


class TestFirstError:
    def test_our_own_message_comes_first(self) -> None:
        log = "cbam_ext: building CPU kernels\na.cpp:1: error: x\ncbam_ext: no C++ compiler\n"
        assert jit.first_error(log) == "no C++ compiler"

    def test_compiler_error(self) -> None:
        log = "[1/2] c++ -Werror -c a.cpp\na.cpp:3:1: error: expected ';'\nb.cpp:9: error: no\n"
        assert jit.first_error(log) == "a.cpp:3:1: error: expected ';'"

    def test_nothing_like_an_error(self) -> None:
        assert jit.first_error("one\ntwo\n\nthree\nfour\n") == "two\nthree\nfour"
        assert jit.first_error("") == "the compiler said nothing"
