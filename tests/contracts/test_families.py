"""Every registered family is held to its table on a tiny model in float64.

The table claims what may be scaled, reordered, removed or split without changing the model. Here each claim is
carried out and the output compared with that of the untouched model.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from ditcompress import structure
from ditcompress.errors import DitcompressError
from ditcompress.models import adapter_for, registry
from ditcompress.models._table import is_linear
from ditcompress.models.base import ROLES, Layout, Site

FAMILIES = registry.names()
TOLERANCE = 1e-9
# SD3 computes the text queries of its last block and throws the answer away (`context_pre_only`), Qwen-Image all of the
# last block's text.
DEAD = {
    "sd3": ("transformer_blocks.1.attn.add_q_proj",),
    "qwen_image": ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.txt_mlp.net.0.proj"),
}


class Case:
    """A tiny model of one family in float64, its table, and one input."""

    def __init__(self, name: str) -> None:
        self.family = registry.get(name)
        self.model = self.family.tiny().double()
        self.layout: Layout = self.family.layout(self.model)
        generator = torch.Generator().manual_seed(1)
        shape = self.family.latent_shape(self.model.config)
        self.latents = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        self.cond = self.family.random_conditions(self.model.config, 2, generator)
        self.reference = self.run(self.model)

    @torch.no_grad()
    def run(self, model: nn.Module, cond: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        return self.family.predict(model, self.latents, torch.tensor([400, 400]), cond or self.cond)

    @torch.no_grad()
    def change(self, model: nn.Module) -> float:
        return float((self.run(model) - self.reference).abs().max())

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def shuffled(count: int, seed: int = 3) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def count_of(layout: Layout, axis: str) -> int:
    return layout.axes[axis].size // layout.axes[axis].unit_size


def cuttable(layout: Layout) -> list[str]:
    return [name for name, axis in layout.axes.items() if axis.cut]


def dense_feed_forwards(model: nn.Module, layout: Layout) -> list[str]:
    found = []
    for name in cuttable(layout):
        try:
            structure.feed_forward_path(model, name, layout)
        except DitcompressError:
            continue
        found.append(name)
    return found


def without_writer(layout: Layout, site: Site) -> Layout:
    """The table as a careless author would write it: `site` no longer writes its axes."""
    forgotten = dataclasses.replace(site, writes=("",))
    return dataclasses.replace(layout, sites=tuple(forgotten if s == site else s for s in layout.sites))


def test_the_output_has_the_shape_of_the_latents_and_is_not_trivial(case: Case) -> None:
    assert case.reference.shape == case.latents.shape
    assert 0.05 < float(case.reference.std()) < 50


def test_every_linear_is_a_site_once_and_has_a_known_role(case: Case) -> None:
    linears = [name for name, module in case.model.named_modules() if is_linear(module)]
    names = [site.name for site in case.layout.sites]
    assert sorted(names) == sorted(linears)
    assert {site.role for site in case.layout.sites} <= set(ROLES) - {"other"}


def test_declared_sizes_are_those_of_the_modules(case: Case) -> None:
    for site in case.layout.sites:
        module = case.model.get_submodule(site.name)
        assert (site.in_features, site.out_features) == (module.in_features, module.out_features)
        for names, width in ((site.reads, site.in_features), (site.writes, site.out_features)):
            if all(names):
                assert sum(case.layout.axes[name].size for name in names) == width, site.name
    for axis in case.layout.axes.values():
        assert axis.size % axis.unit_size == 0
        for fold in axis.fold:
            assert fold.stop - fold.start == axis.size
            assert fold.stop <= case.model.get_parameter(fold.tensor).shape[0]


def test_sites_of_a_block_are_inside_it_and_blocks_are_modules(case: Case) -> None:
    assert case.layout.blocks
    for block in case.layout.blocks:
        case.model.get_submodule(block)
        assert any(site.block == block for site in case.layout.sites)
    for site in case.layout.sites:
        inside = [block for block in case.layout.blocks if site.name.startswith(block + ".")]
        assert [site.block] == (inside or [""])


def test_sites_that_claim_one_input_outside_an_attention_get_the_same_tensor(case: Case) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    model, handles = case.copy(), []
    for site in case.layout.sites:
        if all(site.reads) and site.role != "attn_out":
            record = seen.setdefault(site.input_key, [])
            hook = lambda module, args, record=record: record.append(args[0])  # noqa: E731
            handles.append(model.get_submodule(site.name).register_forward_pre_hook(hook))
    case.run(model)
    for handle in handles:
        handle.remove()
    for key, inputs in seen.items():
        for other in inputs[1:]:
            assert torch.equal(inputs[0], other), key


def test_reordering_units_of_every_axis_keeps_the_output(case: Case) -> None:
    model = case.copy()
    for name in cuttable(case.layout):
        structure.permute_units(model, name, case.layout, shuffled(count_of(case.layout, name)))
    assert cuttable(case.layout) or not case.family.CLASSES
    assert case.change(model) < TOLERANCE


def test_folding_random_scales_through_every_foldable_axis_keeps_the_output(case: Case) -> None:
    model, generator = case.copy(), torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, axis in case.layout.axes.items():
        if axis.fold:
            scale = torch.rand(axis.size, generator=generator, dtype=torch.float64) * 3 + 0.2
            tensors = structure.apply_fold(tensors, name, case.layout, scale)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    model.load_state_dict({**model.state_dict(), **tensors})
    assert case.change(model) < TOLERANCE


def test_cutting_a_zeroed_unit_keeps_the_output_and_shrinks_the_model(case: Case) -> None:
    zeroed = case.copy()
    with torch.no_grad():
        for name in cuttable(case.layout):
            axis = case.layout.axes[name]
            for site in structure.readers(case.layout, name):
                for start, _ in structure.spans(case.layout, site.reads, site.in_features, name):
                    zeroed.get_submodule(site.name).weight[:, start + axis.unit_size : start + 2 * axis.unit_size] = 0
    expected, cut = case.run(zeroed), copy.deepcopy(zeroed)
    for name in cuttable(case.layout):
        layout = case.family.layout(cut)
        structure.cut_units(cut, name, layout, [1])
        assert case.family.layout(cut).axes[name].size == case.layout.axes[name].size - case.layout.axes[name].unit_size
    assert float((case.run(cut) - expected).abs().max()) < TOLERANCE
    smaller = sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in case.model.parameters())
    assert smaller or not cuttable(case.layout)


def test_experts_that_all_fire_sum_to_the_dense_feed_forward(case: Case) -> None:
    model = case.copy()
    names = dense_feed_forwards(model, case.layout)
    for name in names:
        order = shuffled(count_of(case.layout, name))
        partition = [order[:5], order[5 : len(order) // 2], order[len(order) // 2 :]]
        split = structure.split_ffn(model, name, case.layout, partition)
        assert [expert.training for expert in split.experts] == [False] * 3
        model.set_submodule(structure.feed_forward_path(model, name, case.layout), split)
    assert case.change(model) < TOLERANCE


def test_a_writer_left_out_of_the_table_is_caught(case: Case) -> None:
    """Reordering by a table that forgot one writer must show, for every writer of every axis in a block."""
    for name in cuttable(case.layout):
        order = shuffled(count_of(case.layout, name))
        for site in structure.writers(case.layout, name):
            if site.name in DEAD.get(case.family.__name__.rpartition(".")[2], ()):
                continue
            model = case.copy()
            structure.permute_units(model, name, without_writer(case.layout, site), order)
            assert case.change(model) > 1e-6, site.name


def test_a_fold_without_one_of_its_rows_is_caught(case: Case) -> None:
    generator = torch.Generator().manual_seed(6)
    for axis in (axis for axis in case.layout.axes.values() if axis.fold):
        scale = torch.rand(axis.size, generator=generator, dtype=torch.float64) * 3 + 0.2
        broken = dataclasses.replace(axis, fold=axis.fold[:-1])
        model = case.copy()
        tensors = structure.apply_fold(dict(model.named_parameters()), broken, case.layout, scale)
        model.load_state_dict({**model.state_dict(), **tensors})
        assert case.change(model) > 1e-6, axis.name


def test_bfloat16_models_predict_in_the_dtype_of_the_latents(case: Case) -> None:
    model = case.family.tiny().bfloat16()
    output = case.family.predict(model, case.latents.float(), torch.tensor([400, 400]), case.cond)
    assert output.dtype == torch.float32
    assert bool(output.isfinite().all())


def test_the_table_of_a_meta_model_is_that_of_the_real_one(case: Case) -> None:
    with torch.device("meta"):
        model = type(case.model)(**{k: v for k, v in case.model.config.items() if k[0] != "_" and k != "sample_size"})
    assert {s.name for s in case.family.layout(model).sites} == {s.name for s in case.layout.sites}


def test_the_tiny_model_depends_on_its_seed_alone(case: Case) -> None:
    state = torch.random.get_rng_state()
    first, second, other = case.family.tiny(4), case.family.tiny(4), case.family.tiny(5)
    assert torch.equal(state, torch.random.get_rng_state())
    same = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    differs = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert all(differs)


def test_the_second_branch_has_the_shapes_of_the_first(case: Case) -> None:
    null = case.family.null_conditions(case.model.config, case.cond)
    if null is None:
        assert case.family.default_guidance(case.model.config) == 1.0
        return
    assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in case.cond.items()}
    output = case.run(case.model, null)
    assert float((output - case.reference).abs().max()) > 1e-6


def test_the_default_scheduler_steps(case: Case) -> None:
    scheduler = case.family.default_scheduler(case.model.config)
    scheduler.set_timesteps(3)
    step = scheduler.step(case.reference.float(), scheduler.timesteps[0], case.latents.float(), return_dict=False)[0]
    assert step.shape == case.latents.shape


def test_every_class_finds_its_family(case: Case) -> None:
    for name in case.family.CLASSES:
        assert adapter_for(name) is case.family
