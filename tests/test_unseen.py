"""What a comparison of logits does not show: found out from what the sample did, true of the real models, and said.

Every array that is called unseen is changed in the written checkpoint, and no judged logit moves; the check of the weights finds it.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import written
from logit_cases import FAMILIES, plan_of, write
from test_floors import ROOT
from test_models import MODELS, by_hand, reading_by_hand, tokens_for, torch_model

from shardconv.check_report import check_lines
from shardconv.models.decoder import logits, weights_of
from shardconv.models.hf import decoder_of
from shardconv.plan import Plan
from shardconv.verify import apart, insensitive
from shardconv.verify.insensitive import insensitive_leaves
from shardconv.verify.logit_request import Bounds, LogitRequest
from shardconv.verify.logit_verdict import LogitVerdict
from shardconv.verify.logits import check
from shardconv.verify.restoring import restore
from shardconv.verify.roundings import roundings
from shardconv.verify.unseen import unseen_of

Converted = tuple[Path, Plan, Path]
FEW, MANY = (3,), (50,)
# Of two blocks, which is as many as it takes to tell them apart.
MIXTRAL, QWEN = ({**FAMILIES[name], "num_hidden_layers": 2} for name in ("mixtral", "qwen3_moe"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a source and a checkpoint of it, with options of the layout."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    def made(config: dict[str, Any], layout: str, **options: Any) -> Converted:
        root = tmp_path_factory.mktemp("unseen")
        with apart.quiet():
            torch_model(config).save_pretrained(root / "source")
        plan = plan_of(root / "source", layout, **options)
        return root / "source", plan, Path(write(plan, root))

    return made


def compared(made: Converted, lengths: tuple[int, ...], forward: str = "auto", memory: int = 1 << 30) -> LogitVerdict:
    source, plan, folder = made
    return check(LogitRequest(str(folder), str(source), "auto", roundings(plan), forward, lengths, 5, None, Bounds(), False, memory))


def entries(verdict: LogitVerdict) -> dict[str, Any]:
    found = verdict.to_json()["unseen"]
    return {one["what"]: one for one in found}


def leaves_of(arrays: Any) -> Iterator[tuple[str, Any]]:
    """Names and indices of arrays as a verdict words them."""
    for said in arrays:
        name, _, index = said.partition("[")
        root, brace, rest = name.partition("{")
        for last in rest.rstrip("}").split(",") if brace else [""]:
            yield root + last, eval(f"np.s_[{index}") if index else ...


def spoil(part: Any) -> Any:
    def edit(array: Any) -> None:
        array[part] = 7 - array[part]

    return edit


# Experts


@pytest.mark.parametrize(
    ("config", "layout", "options", "memory"),
    [
        (MIXTRAL, "flat", {}, 1 << 30),
        (MIXTRAL, "maxtext", {"vocab": 64}, 1 << 10),
        (QWEN, "flat", {"scan": False}, 1 << 30),
    ],
    ids=["stacked", "layer by layer", "unscanned"],
)
def test_no_logit_shows_a_fault_in_what_is_unseen_and_the_check_of_the_weights_does(
    converted: Any, config: dict[str, Any], layout: str, options: dict[str, Any], memory: int
) -> None:
    made = converted(config, layout, **options)
    before = compared(made, FEW, memory=memory)
    found = entries(before)
    assert before.report.same and before.layer_by_layer is (memory < 1 << 20)
    wanted = {"experts", "rows of the embedding"} | ({"rows that pad the vocabulary"} if options.get("vocab") else set())
    assert found.keys() == wanted
    experts = found["experts"]
    assert 0 < experts["count"] == sum(len(alone["experts"]) for alone in before.to_json()["unrouted"]) < experts["total"] == 12
    rows = found["rows of the embedding"]
    assert (rows["count"], rows["total"]) == (59, 62) and rows["arrays"][0].endswith("[59 of 62]")
    changed = set()
    for leaf, part in leaves_of([*experts["arrays"], *found.get("rows that pad the vocabulary", {"arrays": []})["arrays"]]):
        written.change(made[2], leaf, spoil(part))
        changed.add(leaf)
    after = compared(made, FEW, memory=memory)
    assert after.report.same and after.report.jax == before.report.jax
    choices = written.Choices(layout, options.get("scan", True), "source", "", "auto", options.get("vocab", 0))
    caught = written.checked(made[1], made[2], choices)
    told = "\n".join(problem.fact for problem in caught.problems)  # of leaves that are alike the first one, and the names of the others
    assert {leaf.name for leaf in made[1].leaves if re.search(rf"{re.escape(leaf.name)}(\[|,|$)", told, re.MULTILINE)} == changed
    # And what is not called unseen is seen.
    listed = {(one["block"], expert) for one in before.to_json()["unrouted"] for expert in one["experts"]}
    block, expert = next(one for one in np.ndindex(2, 6) if one not in listed)
    if layout == "maxtext":
        written.change(made[2], "params.params.decoder.layers.MoeBlock_0.wo", spoil((expert, block)))
    elif options.get("scan", True):
        written.change(made[2], "layers.experts.down", spoil((block, expert)))
    else:
        written.change(made[2], f"layers.{block}.experts.down", spoil(expert))
    assert not compared(made, FEW, memory=memory).report.same


def test_with_all_experts_routed_and_all_rows_read_nothing_is_unseen(converted: Any) -> None:
    few_rows = {**QWEN, "vocab_size": 8, "num_experts": 3}
    assert compared(converted(few_rows, "maxtext"), MANY).unseen == ()


def test_the_traced_module_is_taken_to_route_as_the_reference_does(converted: Any) -> None:
    pytest.importorskip("torchax")
    made = converted(MIXTRAL, "flat", vocab=64)
    assert entries(compared(made, FEW, "torch")) == entries(compared(made, FEW))


# What follows from the model


@pytest.mark.parametrize(
    ("name", "part", "count"),
    [
        ("learned positions", "*.k_bias", 12),
        ("layer norm with bias, parallel, part of the head rotated", "*.k_bias[..., 4:]", 4),
        ("biases", None, 0),
        ("head norms", None, 0),
    ],
)
def test_a_keys_bias_is_unseen_in_dims_that_are_not_rotated(name: str, part: str | None, count: int) -> None:
    model, tokens = torch_model(MODELS[name]), tokens_for(MODELS[name], 1)[:, :40]
    decoder = decoder_of(MODELS[name])
    if name == "head norms":  # they show a bias before them, rotated or not
        decoder = replace(decoder, rope=None)
    reading, leaves = reading_by_hand(decoder, by_hand(model, decoder))
    found = {one.what: one for one in unseen_of(reading, {key: leaf.shape for key, leaf in leaves.items()}, list(tokens), {}, {})}
    biases = found.pop("dims of the key's bias", None)
    assert (biases is None) is (part is None)

    def moved(changed: Mapping[str, Any]) -> float:
        run = [logits(weights_of(reading, one), jnp.asarray(tokens)) for one in (leaves, {**leaves, **changed})]
        return float(jnp.abs(run[0] - run[1]).max())

    first = (decoder.head_dim - count) if biases else decoder.head_dim
    names = [key for key in leaves if key.endswith("k_bias")]
    assert len(names) == decoder.layers
    if biases is not None:
        assert (biases.arrays, biases.count, biases.total) == ((str(part),), count, decoder.head_dim)
        assert moved({key: leaves[key].at[..., first:].add(1.0) for key in names}) < 1e-4
    if first:
        assert moved({key: leaves[key].at[..., :first].add(1.0) for key in names}) > 1e-2
    rows = found.pop("rows of the positions", None)
    assert (rows is not None) is ("positions" in leaves)
    if rows is not None:
        assert rows.arrays == ("positions[40:]",) and rows.count == 128 - 40
        assert moved({"positions": leaves["positions"].at[40:].multiply(3.0)}) == 0
        assert moved({"positions": leaves["positions"].at[39:].multiply(3.0)}) > 1e-2


# Forwards of the user's own

MIXTURE = '''
import jax, jax.numpy as jnp
from user_models import attended, normed

@jax.jit
def forward(params, tokens):
    x = params["embed"][tokens]
    for layer in range(2):
        p = jax.tree.map(lambda leaf: leaf[layer], params["layers"])
        x = x + attended(normed(x, p["attn_norm"]), **p["attn"])
        y, experts = normed(x, p["mlp_norm"]), p["experts"]
        best, chosen = jax.lax.top_k(jnp.einsum("btd,de->bte", y, experts["router"]), 2)
        shares = jnp.sum(jax.nn.one_hot(chosen, 6) * jax.nn.softmax(best)[..., None], axis=-2)
        inner = jax.nn.silu(jnp.einsum("btd,edf->btef", y, experts["gate"])) * jnp.einsum("btd,edf->btef", y, experts["up"])
        x = x + jnp.einsum("bte,btef,efd->btd", shares, inner, experts["down"])
    return jnp.einsum("btd,dv->btv", normed(x, params["final_norm"]), params["unembed"])
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), *(entry for entry in sys.path if entry)])
    yield tmp_path
    sys.modules.pop("unseen_forward", None)


def test_of_a_users_own_forward_it_is_measured(converted: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "unseen_forward.py").write_text(MIXTURE)
    made = converted({**MIXTRAL, "rope_theta": 10_000.0, "vocab_size": 16}, "flat")
    lengths = (2, 3)
    verdict, known = compared(made, lengths, "unseen_forward:forward"), compared(made, lengths)
    assert verdict.report.same and verdict.unsought == ""
    measured = entries(verdict)
    assert measured.keys() == {"arrays, in part,"}
    (alone,) = [one for one in known.unseen or () if one.what == "experts"]
    (rows,) = [one for one in known.unseen or () if one.what == "rows of the embedding"]

    def places(arrays: Any) -> set[Any]:
        found = set()
        for leaf, part in leaves_of(", ".join(arrays).replace("], ", "]\n").splitlines()):
            marks = np.zeros((2, 6) if "experts" in leaf else 16, bool)
            marks[part] = True
            found |= {(leaf, *place) for place in np.argwhere(marks).tolist()}
        return {(leaf, *map(int, place)) for leaf, *place in found}

    assert places(measured["arrays, in part,"]["arrays"]) == places([*alone.arrays, *rows.arrays])
    # Where copies have no room, and where it would take longer than the comparison, it is said and not done.
    leaves = dict(restore(str(made[2]), jax.devices()).leaves)
    tokens = [np.arange(2), np.arange(3)]
    needed = 12 * sum(leaf.size for leaf in leaves.values())
    why = "that takes 0.0 GB for copies of the arrays and a gradient (check.memory)"
    assert insensitive_leaves("unseen_forward:forward", leaves, tokens, needed - 1, 9.0) == (None, why)
    monkeypatch.setattr(insensitive, "_timed", lambda *_: 1.5)
    why = "that takes about 18 s, and the comparison took 17 s"
    assert insensitive_leaves("unseen_forward:forward", leaves, tokens, needed, 17.0) == (None, why)
    monkeypatch.setattr(insensitive, "_timed", lambda *_: 0.0)
    module = sys.modules["unseen_forward"]
    monkeypatch.setattr(module, "forward", lambda params, tokens, forward=module.forward: jnp.asarray(np.asarray(forward(params, tokens))))
    why = "JAX cannot differentiate unseen_forward:forward (TracerArrayConversionError)"
    assert insensitive_leaves("unseen_forward:forward", leaves, tokens, needed, 17.0) == (None, why)


# What is said


UNSEEN = {
    "what": "experts",
    "arrays": [f"layers.experts.{{gate,up}}[{layer}, 1]" for layer in range(5)],
    "why": "no judged token went to them",
    "count": 5,
    "total": 1000,
}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "--check all compares them too, bit by bit"),
        ({"whole": True, "problems": []}, "the check of the weights has compared them, bit by bit"),
        ({"whole": True, "problems": [1]}, "see what the check of the weights found"),
        ({"whole": False, "problems": []}, 'the check of the weights looked at a sample: check.sample = "all" compares every bit'),
    ],
)
def test_the_report_says_what_is_unseen_and_who_speaks_for_it(weights: dict[str, Any] | None, said: str) -> None:
    found = {"equal": False, "problems": [], "notes": [], "title": "it", "unseen": [UNSEEN]}
    counts = {"elements": 1, "leaves": 1, "boxes": 1, "seed": 0, "leaves_rounded": 0, "seconds": 1.0, "independent": True}
    lines = check_lines({"weights": None if weights is None else {**counts, **weights, "notes": []}, "logits": found})
    assert [text for label, text in lines if label == "unseen"] == [
        "5 of 1,000 experts (layers.experts.{gate,up}[0, 1], layers.experts.{gate,up}[1, 1], layers.experts.{gate,up}[2, 1] and 2 more): "
        "no judged token went to them",
        f"of these the logits say nothing{', and' if weights and not weights['whole'] else ':'} {said}",
    ]


def test_nothing_is_said_where_nothing_is_unseen() -> None:
    found = {"equal": False, "problems": [], "notes": [], "title": "it", "unseen": []}
    assert [label for label, _ in check_lines({"weights": None, "logits": found})] == ["check"]
