"""The public surface, what an import pulls in, and who may import whom."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import vggfeat

REPO = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "kornia", "PIL", "numpy", "safetensors", "h5py", "scipy")

# Who may import whom: for each module of ours, the modules of ours that it uses, in functions too, but not for types
# alone (under TYPE_CHECKING). It points one way: plain data and errors at the bottom, the trunk and the features on
# them, losses and style transfer side by side on top, and the commands outside. Weights and network are of one level:
# `network.vgg(weights=...)` asks for weights when it is called, weights know the network as a type only.
ROOMS = {
    "vggfeat": set(),  # names its modules as text and imports them when they are asked for
    "vggfeat.errors": set(),
    "vggfeat.arch": {"errors"},
    "vggfeat.settings": {"errors"},
    "vggfeat.files": {"errors"},
    "vggfeat.signals": set(),
    "vggfeat.checkpoint": {"devices", "errors", "files"},
    "vggfeat.image": {"errors", "files"},
    "vggfeat.modes": set(),
    "vggfeat.functional": {"modes", "devices"},
    "vggfeat.kernels": set(),
    "vggfeat.cuda_graphs": {"errors"},
    "vggfeat.weights": {"weights.fetch", "weights.sets"},
    "vggfeat.weights.fetch": {"errors", "files"},
    "vggfeat.weights.files": {"arch", "devices", "errors"},
    "vggfeat.weights.state_dicts": {"arch", "errors"},
    "vggfeat.weights.random": {"arch", "weights.state_dicts"},
    "vggfeat.weights.sets": {
        "arch",
        "checkpoint",
        "errors",
        "weights.fetch",
        "weights.files",
        "weights.random",
        "weights.state_dicts",
    },
    "vggfeat.devices": {"errors", "kernels", "modes"},
    "vggfeat.winograd": {"modes", "devices"},
    "vggfeat.convolution": {"modes", "devices", "winograd"},
    "vggfeat.network": {"arch", "convolution", "errors", "functional", "weights"},
    "vggfeat.trunk": {
        "trunk.autograd",
        "trunk.filters",
        "trunk.plain",
        "trunk.plan",
        "trunk.stage",
        "trunk.walk",
    },
    "vggfeat.trunk.plan": {"arch"},
    "vggfeat.trunk.direct": {"devices"},
    "vggfeat.trunk.filters": {"arch", "modes", "trunk.direct", "trunk.plan", "winograd"},
    "vggfeat.trunk.bits": {"devices"},
    "vggfeat.trunk.layers": {"arch", "devices", "trunk.bits", "trunk.direct", "trunk.filters", "winograd"},
    "vggfeat.trunk.plain": {"trunk.filters", "trunk.layers", "trunk.plan"},
    "vggfeat.trunk.stage": {"devices", "trunk.bits", "trunk.filters", "trunk.layers", "trunk.plan"},
    "vggfeat.trunk.strips": {"trunk.plan", "trunk.stage"},
    "vggfeat.trunk.walk": {"modes", "trunk.filters", "trunk.layers", "trunk.plan", "trunk.stage", "trunk.strips"},
    "vggfeat.trunk.operators": {"trunk.bits", "trunk.layers", "trunk.plan", "trunk.stage", "trunk.walk"},
    "vggfeat.trunk.autograd": {"modes", "trunk.operators", "trunk.plain", "trunk.plan", "trunk.walk"},
    "vggfeat.features": {
        "arch",
        "devices",
        "errors",
        "functional",
        "modes",
        "settings",
        "trunk",
        "weights",
        "weights.state_dicts",
    },
    "vggfeat.tables": set(),
    "vggfeat.analysis": {"analysis.comparison", "analysis.fields", "analysis.layers", "analysis.measure"},
    "vggfeat.analysis.layers": {"arch", "errors", "tables"},
    "vggfeat.analysis.measure": set(),
    "vggfeat.analysis.comparison": {
        "analysis.layers",
        "analysis.measure",
        "arch",
        "devices",
        "errors",
        "modes",
        "network",
        "tables",
    },
    "vggfeat.analysis.fields": {"arch", "errors", "features", "modes", "tables", "weights"},
    "vggfeat.plots": {"analysis", "arch", "errors", "files", "image", "tables", "weights"},
    "vggfeat.encoded_target": {"errors"},
    "vggfeat.feature_loss": {
        "arch",
        "cuda_graphs",
        "encoded_target",
        "errors",
        "features",
        "functional",
        "modes",
        "weights",
    },
    "vggfeat.losses": {"encoded_target", "errors", "feature_loss", "functional", "modes"},
    "vggfeat.metrics": {"errors", "features", "losses", "weights", "weights.files"},
    "vggfeat.transfer": set(),
    "vggfeat.transfer.config": {"arch", "errors", "settings"},
    "vggfeat.transfer.optimize": set(),
    "vggfeat.transfer.tiles": {"arch", "features", "devices"},
    "vggfeat.transfer.objective": {"features", "functional", "transfer.config", "transfer.tiles", "trunk"},
    "vggfeat.transfer.stylize": {
        "",  # the package itself, for its version
        "checkpoint",
        "errors",
        "features",
        "cuda_graphs",
        "devices",
        "files",
        "image",
        "modes",
        "settings",
        "transfer.config",
        "transfer.objective",
        "transfer.optimize",
        "transfer.tiles",
        "weights",
    },
    "vggfeat.visualize": {"visualize.dreams", "visualize.heat", "visualize.sheet", "visualize.units"},
    "vggfeat.visualize.inputs": {"errors", "image"},
    "vggfeat.visualize.sheet": {"errors", "image", "tables"},
    "vggfeat.visualize.units": {
        "arch",
        "errors",
        "features",
        "functional",
        "image",
        "visualize.inputs",
        "visualize.sheet",
        "weights",
    },
    "vggfeat.visualize.dreams": {
        "arch",
        "errors",
        "features",
        "functional",
        "image",
        "modes",
        "devices",
        "transfer.config",
        "transfer.optimize",
        "transfer.stylize",
        "visualize.inputs",
        "visualize.sheet",
        "weights",
    },
    "vggfeat.visualize.heat": {
        "arch",
        "errors",
        "features",
        "functional",
        "image",
        "losses",
        "metrics",
        "modes",
        "network",
        "tables",
        "visualize.inputs",
        "visualize.sheet",
        "weights",
    },
    "vggfeat.training": set(),
    "vggfeat.training.__main__": set(),
    "vggfeat.training.config": {"arch", "errors", "settings"},
    "vggfeat.training.cifar": {"errors"},
    "vggfeat.training.data": {"errors", "files", "image", "devices", "training.cifar", "training.readers"},
    "vggfeat.training.readers": {"errors", "image", "signals"},
    "vggfeat.training.batches": {
        "devices",
        "errors",
        "training.config",
        "training.data",
        "training.distributed",
        "training.kernels",
        "training.readers",
        "weights",
    },
    "vggfeat.training.distributed": {"devices"},
    "vggfeat.training.evaluation": {
        "arch",
        "errors",
        "files",
        "network",
        "devices",
        "settings",
        "tables",
        "training.batches",
        "training.config",
        "training.data",
        "training.distributed",
        "training.readers",
        "weights",
    },
    "vggfeat.training.kernels": {"kernels"},
    "vggfeat.training.muon": {"cuda_graphs", "devices", "training.kernels"},
    "vggfeat.training.fused": {"kernels", "network", "training.kernels"},
    "vggfeat.training.learner": {
        "cuda_graphs",
        "devices",
        "network",
        "training.components",
        "training.config",
        "training.distributed",
        "training.fused",
    },
    "vggfeat.training.components": {
        "arch",
        "errors",
        "network",
        "devices",
        "training.batches",
        "training.config",
        "training.muon",
        "weights",
    },
    "vggfeat.training.folder": {
        "arch",
        "checkpoint",
        "errors",
        "files",
        "network",
        "settings",
        "training.config",
        "training.data",
    },
    "vggfeat.training.loop": {
        "arch",
        "checkpoint",
        "errors",
        "files",
        "modes",
        "network",
        "devices",
        "signals",
        "training.batches",
        "training.components",
        "training.config",
        "training.data",
        "training.distributed",
        "training.evaluation",
        "training.folder",
        "training.learner",
        "training.readers",
    },
    "vggfeat_cli": set(),
    "vggfeat_cli.run": {"errors", "files", "signals"},
    "vggfeat_cli.options": {"settings"},
    "vggfeat_cli.reports": {"errors", "files", "plots"},
    "vggfeat_cli.style": {"", "errors", "files", "image", "transfer.config"},
    "vggfeat_cli.analyse": {"", "image", "plots", "weights"},
    "vggfeat_cli.learn": {"", "errors", "files", "plots", "settings", "training.config"},
    "vggfeat_cli.pictures": {"", "arch", "errors", "visualize", "weights"},
    "vggfeat_cli.main": {"", "weights"},
}
# modules that must not need more than this to be imported
LIGHT = {"vggfeat", "vggfeat.errors", "vggfeat.arch", "vggfeat.transfer", "vggfeat.transfer.config", "vggfeat_cli"}
LIGHT |= {"vggfeat.files", "vggfeat.tables", "vggfeat.plots", "vggfeat_cli.analyse", "vggfeat.analysis"}
LIGHT |= {f"vggfeat.analysis.{name}" for name in ("comparison", "fields", "layers", "measure")}
LIGHT |= {"vggfeat.settings", "vggfeat.training", "vggfeat.training.config"}
LIGHT |= {"vggfeat_cli.pictures", "vggfeat_cli.learn", "vggfeat_cli.options", "vggfeat_cli.reports"}
LIGHT |= {"vggfeat_cli.run", "vggfeat_cli.style", "vggfeat_cli.main"}


def sources():
    for root in (REPO / "vggfeat", REPO / "cli" / "vggfeat_cli"):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


SOURCES = dict(sources())


def imports(module, *, top_level_only=False):
    """The dotted names that a module imports; what is under TYPE_CHECKING does not count."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} has a relative import: write its full name"
                for (
                    alias
                ) in child.names:  # `from vggfeat import trunk` names a module, `from vggfeat.arch import Arch` not
                    name = f"{child.module}.{alias.name}"
                    yield name if name in SOURCES else child.module
            elif not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                yield from walk(child)

    return set(walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))))


def python(code, *paths, **environment):
    """Run code in a fresh interpreter that finds this checkout, and return what it printed."""
    path = os.pathsep.join(map(str, (*paths, REPO, REPO / "cli")))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ── the public names ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", vggfeat.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(vggfeat, name)
    assert name in dir(vggfeat)
    if name != "__version__":
        assert (inspect.getdoc(value) or "").strip()
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__.strip()  # its own, not one that is inherited
        assert value.__module__.startswith("vggfeat.")


def test_contract():
    """The names that other code is written against."""
    needed = "vgg vgg11 vgg13 vgg16 vgg19 VGGFeatures PerceptualLoss StyleLoss stylize StyleConfig VGGFeatError"
    assert set(needed.split()) <= set(vggfeat.__all__)
    assert callable(vggfeat.vgg)
    importlib.import_module("vggfeat.network")
    assert callable(vggfeat.vgg)  # no module of that name may take the function's place
    with pytest.raises(AttributeError, match="'vggfeat' has no attribute 'vgg20'"):
        _ = vggfeat.vgg20


def test_version_is_that_of_pyproject():
    import tomllib

    with (REPO / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert "version" in project.get("dynamic", ()) or project["version"] == vggfeat.__version__


def test_typed():
    """Type checkers see what is imported under TYPE_CHECKING: the same names, from the same modules."""
    assert resources.files("vggfeat").joinpath("py.typed").is_file()
    (block,) = (node for node in ast.parse(Path(vggfeat.__file__).read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    for name in set(vggfeat.__all__) - {"__version__"}:
        home = getattr(vggfeat, name).__name__.rpartition(".")[0] if name in vggfeat._MODULES else vggfeat._HOME[name]
        (found,) = (node for node in block.body if name in [alias.name for alias in node.names])
        assert found.module == home
        assert name in [alias.asname for alias in found.names]
    assert sum(len(node.names) for node in block.body) == len(vggfeat.__all__) - 1


# ── what an import pulls in ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "code",
    [
        "import vggfeat; vggfeat.StyleConfig; vggfeat.InputError; vggfeat.errors; dir(vggfeat)",
        "import vggfeat.arch, vggfeat.transfer, vggfeat_cli.run",
        "import vggfeat_cli.style as c; c.command.main(['--help'], standalone_mode=False)",
        "import vggfeat_cli.style as c; c.command.main(['--version'], standalone_mode=False)",
        "import vggfeat_cli.main as c; c.command.main(['--help'], standalone_mode=False)",
        "import vggfeat_cli.learn as c; c.train.main(['--help'], standalone_mode=False)",
    ],
)
def test_no_torch_until_it_is_needed(code):
    last = python(f"{code}; import sys; print(); print(*sys.modules)").splitlines()[-1]
    assert not {module.split(".")[0] for module in last.split()} & set(HEAVY)


def test_help_names_every_setting():
    import dataclasses

    text = python("import vggfeat_cli.style as c; c.command.main(['--help'], standalone_mode=False)")
    for field in dataclasses.fields(vggfeat.StyleConfig):
        assert "--" + field.name.replace("_", "-") in text
    text = python("import vggfeat_cli.learn as c; c.train.main(['--help'], standalone_mode=False)")
    for field in dataclasses.fields(vggfeat.TrainConfig):
        assert "--" + field.name.replace("_", "-") in text


# ── who imports whom ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("module", SOURCES)
def test_import_directions(module):
    assert module in ROOMS, f"{module} is new: give it a line in ROOMS and in ARCHITECTURE.md"
    ours = {name for name in imports(module) if name.split(".")[0] in ("vggfeat", "vggfeat_cli")}
    found = {name.removeprefix("vggfeat").removeprefix(".") for name in ours if name.split(".")[0] == "vggfeat"}
    assert found <= ROOMS[module]
    if not module.startswith("vggfeat_cli") and not module.endswith(".__main__"):  # which is a command itself
        assert ours == {name for name in ours if name.split(".")[0] == "vggfeat"}, "the library imports no command"


def test_no_line_of_the_table_is_stale():
    assert ROOMS.keys() == SOURCES.keys()
    for module, allowed in ROOMS.items():
        used = {name.removeprefix("vggfeat").removeprefix(".") for name in imports(module) if "_cli" not in name}
        assert allowed <= used, f"{module} no longer imports {allowed - used}"


def test_the_directions_have_no_circle():
    done = set()

    def follow(module, path):
        assert module not in path, f"a circle: {' → '.join((*path, module))}"
        if module not in done:
            for name in ROOMS[module] - {""}:
                follow(f"vggfeat.{name}", (*path, module))
            done.add(module)

    for module in ROOMS:
        follow(module, ())


@pytest.mark.parametrize("module", SOURCES)
def test_imports_at_the_top(module):
    top = {name.split(".")[0] for name in imports(module, top_level_only=True)}
    assert not top & {"torchvision", "kornia", "h5py"}
    if module in LIGHT:
        assert not top & set(HEAVY)
    if module == "vggfeat.functional":
        assert top - set(sys.stdlib_module_names) == {"torch", "vggfeat"}
    if module == "vggfeat.errors":
        assert top <= set(sys.stdlib_module_names)
    everywhere = {name.split(".")[0] for name in imports(module)}
    if not module.startswith("vggfeat_cli"):
        assert "click" not in everywhere  # only the commands speak to a terminal


# ── broken installations ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_broken_torchvision_does_not_stop_us(tmp_path):
    """The commonest broken installation: a torchvision built for another torch."""
    broken = tmp_path / "torchvision"
    broken.mkdir()
    broken.joinpath("__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = """
import json
import torch
from PIL import Image
import vggfeat

torch.set_num_threads(1)
try:
    import torchvision
except RuntimeError as error:
    trouble = str(error)
layers = ["relu1_1", "relu2_1"]
options = {"weights": "bundled"}
x = torch.rand(1, 3, 32, 32, requires_grad=True)
for kind in (vggfeat.PerceptualLoss, vggfeat.StyleLoss):
    kind(layers, **options)(x, torch.rand(1, 3, 32, 32)).backward()
content = Image.linear_gradient("L").convert("RGB")
style = Image.radial_gradient("L").convert("RGB")
config = vggfeat.StyleConfig(size=48, steps=2, style_layers=layers, content_layers=("relu2_1",), **options)
result = vggfeat.stylize(content, style, config)
vggfeat.vgg11(width=0.125, head="slim", num_classes=2)(x.detach())
print(json.dumps([trouble, float(x.grad.abs().max()), result.image.size]))
"""
    trouble, gradient, size = json.loads(python(code, tmp_path).splitlines()[-1])
    assert trouble == "operator torchvision::nms does not exist"
    assert gradient > 0
    assert size == [48, 48]
