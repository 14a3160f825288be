"""What every test shares: no network, caches of its own, the CPU, and tiny checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch or transformers are imported; child processes inherit all of it. Under pytest-xdist
# the workers inherit the controller's folder, so that converted tokenizers are shared.
_OWN_FOLDER = None
if "FINETUNE_TEST_SESSION" not in os.environ:
    _OWN_FOLDER = Path(tempfile.mkdtemp(prefix="finetune-tests-"))
    os.environ["FINETUNE_TEST_SESSION"] = str(_OWN_FOLDER)
    os.environ["FINETUNE_CACHE"] = str(_OWN_FOLDER / "cache")
    os.environ["HF_HOME"] = str(_OWN_FOLDER / "hf")
    (_OWN_FOLDER / "cache").mkdir()
    if kept := os.environ.get("FINETUNE_TEST_CACHE"):  # converted tokenizers outlive the session
        (Path(kept) / "tokenizers").mkdir(parents=True, exist_ok=True)
        (_OWN_FOLDER / "cache" / "tokenizers").symlink_to(Path(kept).resolve() / "tokenizers")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not os.environ.get("FINETUNE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU, slowly
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

# Property tests draw the same examples each time; HYPOTHESIS_PROFILE=default draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_unconfigure() -> None:
    if _OWN_FOLDER is not None:
        shutil.rmtree(_OWN_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def glm4_assets() -> Path:
    """The folder with real tokenizer files, data and golden references."""
    folder = os.environ.get("GLM4_ASSETS")
    if not folder:
        pytest.skip("GLM4_ASSETS is not set: no real tokenizer, data or golden references here")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tiny_chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny(tmp_path_factory, "chatglm")


@pytest.fixture(scope="session")
def tiny_glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny(tmp_path_factory, "glm")


@pytest.fixture(scope="session")
def tiny_glm4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny(tmp_path_factory, "glm4")


def _tiny(factory: pytest.TempPathFactory, family: str) -> Path:
    import tiny  # imports torch, which tests of the torch-free rooms must not pay for

    return tiny.save_model(factory.mktemp("models") / f"tiny-{family}", family)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is forced to the disk, and `rename`, in order."""
    found: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def noted(descriptor: int) -> None:
        found.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", lambda *a: (found.append("rename"), rename(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (found.append("rename"), replace(*a)))
    return found
