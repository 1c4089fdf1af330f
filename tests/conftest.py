"""Fixtures for all tests: test data that may be absent, no Internet, no caches of the person who runs them."""

import itertools
import os
import signal
from pathlib import Path

# threads that wait must sleep: spinning on a core that somebody else uses makes small convolutions 100 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

from vggfeat.weights import sets as weights  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
OXFORD = "vgg19-oxford-conv1_1-conv3_4.safetensors"
NOWHERE = "http://127.0.0.1:9/"  # the discard port: nothing listens there


_homes = itertools.count()
_random = {}


def pytest_configure(config):
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is bit for bit the same on a CPU is not on a GPU
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(config, items):
    asked = config.option.markexpr or ""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for mark in ("slow", "network"):
            if mark in item.keywords and mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"asked for with -m {mark}"))


@pytest.fixture(autouse=True)
def _sealed(request, tmp_path_factory, monkeypatch):
    """An empty torch.hub cache, no VGGFEAT variables, and every published file at an address where nobody answers."""
    home = tmp_path_factory.getbasetemp() / f"torch_home{next(_homes)}"
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # set_dir() of an earlier test
    for name in ("VGGFEAT_WEIGHTS", "VGGFEAT_WEIGHTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    if "network" not in request.keywords:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv("no_proxy", "*")
        sets = {
            name: {
                arch: weights.Published(NOWHERE + entry.filename, entry.convention, entry.licence)
                for arch, entry in entries.items()
            }
            for name, entries in weights.SETS.items()
        }
        monkeypatch.setattr(weights, "SETS", sets)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Images of a few pixels are no work for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _drawn_once(request, monkeypatch):
    """Random weights are drawn and calibrated once for all tests but their own: at full width that takes a second."""
    draw = weights.random_state

    def remembered(arch):
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():  # fake tensors, other devices
            return draw(arch)
        if arch not in _random:
            _random[arch] = draw(arch)
        return {key: value.clone() for key, value in _random[arch].items()}

    if request.module.__name__ != "test_weights":
        monkeypatch.setattr(weights, "random_state", remembered)


@pytest.fixture
def real_signals():
    """Ctrl-C raises KeyboardInterrupt in the background too, and a hangup is not ignored under nohup."""
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): handler for name, handler in usual.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _folder(variable, default, needed):
    folder = Path(os.environ.get(variable) or default)
    if not (folder / needed).exists():
        pytest.skip(f"no {folder / needed}: set {variable} to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def test_data():
    """The folder with photos/ and paintings/."""
    folder = _folder("VGGFEAT_TEST_DATA", REPO.parent / "shared" / "data", "photos")
    return _folder("VGGFEAT_TEST_DATA", folder, "paintings")


@pytest.fixture(scope="session")
def oxford():
    """The file with Oxford's VGG-19 up to conv3_4."""
    return _folder("VGGFEAT_TEST_WEIGHTS", REPO.parent / "shared" / "weights", OXFORD) / OXFORD


@pytest.fixture(scope="session")
def torchvision():
    """The torchvision package, where it is there and works."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # "operator torchvision::nms does not exist" is a RuntimeError
        pytest.skip(f"torchvision does not work here: {str(error).splitlines()[0]}")
    return torchvision
