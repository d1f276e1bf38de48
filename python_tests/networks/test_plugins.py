"""Networks that installed packages register."""

import sys

import pytest

from timm_ext.errors import InputError
from timm_ext.networks import plugins, registry

MODULE = """
from torch import nn
from timm_ext.networks import NetworkSpec, register_network

class Two(nn.Sequential):
    def __init__(self, in_channels, out_channels, width=4):
        super().__init__(nn.Conv3d(in_channels, width, 3, padding=1), nn.Conv3d(width, out_channels, 1))

def register():
    register_network(NetworkSpec(name=__name__, build=Two))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return what installs a package with one module and one entry point."""
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def installed(name, code, entry):
        (tmp_path / f"{name}.py").write_text(code)
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {entry}\n")
        plugins.load_installed.cache_clear()

    yield installed
    plugins.load_installed.cache_clear()


@pytest.mark.parametrize(("name", "entry"), [("nets_by_call", ":register"), ("nets_by_import", "")])
def test_an_entry_point_registers_networks(install, name, entry):
    install(name, MODULE if entry else f"{MODULE}\nregister()\n", f"{name}{entry}")
    assert name in registry.network_names()
    network = registry.build_network(name, in_channels=2, out_channels=3, width=5)
    assert [tuple(layer.weight.shape[:2]) for layer in network] == [(5, 2), (3, 5)]
    assert registry.network_spec(name).name == name  # loaded once: a second time the name would be taken


def test_an_entry_point_that_cannot_be_loaded_is_named(install):
    install("broken_nets", "raise KeyError('no such thing')", "broken_nets")
    message = r"timm_ext.networks: broken_nets: expected an entry point that can be loaded \(got KeyError"
    with pytest.raises(InputError, match=message):
        registry.network_names()
