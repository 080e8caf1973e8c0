"""From a config to a plan: what only the two together can get wrong."""

from pathlib import Path

import pytest
from conversions import make_config, make_source

from shardconv.errors import ConfigError
from shardconv.planning import plan_from_config


def test_a_mesh_rule_for_an_axis_that_no_model_has_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    rules = 'mesh.rules={embedd = "fsdp", experts = "fsdp"}'
    with pytest.raises(ConfigError) as refused:
        plan_from_config(make_config(tmp_path, source, "mesh.axes={fsdp = 2}", rules))
    assert str(refused.value) == (
        "the mesh rules do not fit the model (1 problem):\n"
        "  mesh.rules.embedd names no axis of a model\n"
        '      did you mean "embed"? this one has embed, head_dim, heads, kv_heads, layers, mlp, vocab'
    )
    plan_from_config(make_config(tmp_path, source, "mesh.axes={fsdp = 2}", 'mesh.rules={experts = "fsdp"}'))
