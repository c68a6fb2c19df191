"""Ranking a small model's sites from beginning to end: what is measured, what is resumed, what recipes and the command line make of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers import PixArtTransformer2DModel

import edit_compile as ec
import toy
from edit_compile.api import plan_with_forwards
from edit_compile.cli import main
from edit_compile.distillation import load_recipe
from edit_compile.distillation.evaluate.validation import validate
from edit_compile.distillation.ranking import folder as files
from edit_compile.distillation.ranking import measure as measuring
from edit_compile.distillation.ranking import rank as ranking_module
from edit_compile.distillation.ranking import sets as sets_module
from edit_compile.distillation.ranking import subject
from edit_compile.distillation.ranking.rank import ranking_recipe, recipe_for
from edit_compile.distillation.ranking.subject import RankedModel
from edit_compile.distillation.train import checkpoints
from edit_compile.files import claimed
from edit_compile.progress import listening

STEPS, SIDE = 4, 16
FILES = ("ranking.json", "ranking.md", "pareto.png", "settings.json", "sets.json", "fits", "chosen")
COMPETING = ["edit", {"design": "kv-compress", "layer_norm": False}, "keep"]
CANDIDATES = ["edit (1 of 2)", "kv-compress (layer_norm=False) (2 of 2)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a PixArt transformer of three blocks."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PixArtTransformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=12,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
    toy.shaken(made, amount=0.2).save_pretrained(folder)
    return str(folder)


def recipe(model, **changes):
    stage = {"resolution": SIDE, "steps": 1, "global_batch_size": 2, "lr": 1e-3}
    fit = {"steps": STEPS, "global_batch_size": 2, "lr": 1e-2, "warmup_steps": 0}
    validation = {"samples": 6, "batch_size": 2, "timestep_bins": 2}
    common = {"model": model, "data": {"kind": "random"}, "stages": [stage], "layerwise": fit, "validation": validation}
    return ec.Recipe.model_validate(common | {"save_every": 2, "log_every": 1, "trackers": []} | changes)


def rank(model, folder, **options):
    return ec.rank(model, folder, recipe=recipe(model), candidates=COMPETING, **options)


@pytest.fixture(scope="module", autouse=True)
def planned_once():
    """Plan every candidate once for all rankings of this file: that is most of what they cost."""
    known = {}

    def plan(loaded, config):
        key = (loaded.source, config)
        if key not in known:
            known[key] = plan_with_forwards(loaded, config)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (subject, sets_module):
            patch.setattr(module, "plan_with_forwards", plan)
        yield


class Heard:
    """Notes the steps of measuring, under the candidate or set that they are of."""

    def __init__(self):
        self.open, self.told = [], []

    def began(self, work):
        self.open.append(work.what)

    def advanced(self, work):
        if work.what in ("layerwise fit", "one site at a time", "timing sites"):
            self.told.append((self.open[0], work.what, work.done, work.total))

    def ended(self, work):
        self.open.remove(work.what)

    def closed(self):
        pass


@pytest.fixture(scope="module")
def ranked(model, tmp_path_factory):
    folder, heard = tmp_path_factory.mktemp("ranked") / "r", Heard()
    with listening(heard):
        return folder, rank(model, folder, sites=["flops <= 0.95x"]), heard.told


def copied(ranked, tmp_path):
    return shutil.copytree(ranked[0], tmp_path / "r")


def test_every_site_is_measured_for_every_candidate(ranked):
    folder, ranking, told = ranked
    measured = [site for site in ranking.sites if site.measures]
    assert [site.path for site in measured] == [f"transformer_blocks.{n}.attn1" for n in range(3)]
    assert [site.reason for site in ranking.sites if not site.measures] == ["cross-attention: linear in image tokens already"] * 3
    for site in measured:
        assert [(m.candidate, m.design) for m in site.measures] == [(0, "edit"), (1, "kv-compress")]
        assert site.measures[1].options["layer_norm"] is False
        assert all(m.error > 0 and len(m.bins) == 2 for m in site.measures)
    assert ranking.image_tokens == (SIDE // 2) ** 2
    assert {path.name for path in folder.iterdir()} == set(FILES)
    fits = [(name, "layerwise fit", step, STEPS) for name in CANDIDATES for step in range(1, STEPS + 1)]
    assert [at for at in told if at[1] == "layerwise fit"] == fits
    assert [at for at in told if at[1] == "one site at a time"] == [
        (name, "one site at a time", n, 3) for name in CANDIDATES for n in (1, 2, 3)
    ]
    assert ec.Ranking.read(folder) == ranking
    page = (folder / "ranking.md").read_text()
    assert "| rank | site | edit | kv-compress (layer_norm=False) |" in page
    assert "3 of 6 sites stay as they are: cross-attention" in page
    assert "| sites | FLOPs of the best | best | first | last | random, mean |" in page


def context_of(student, model):
    return RankedModel(ranking_recipe(model, recipe(model)), (), files.RankingFolder(Path("nowhere"))).context(student)


def test_an_error_is_that_of_the_model_with_one_site_converted(ranked, model):
    """Convert one site alone, give it the fitted weights, and validate as a run does."""
    folder, ranking, _ = ranked
    fitted = ec.load(folder / "fits" / "edit", base=ec.load_model(model).model)
    path = "transformer_blocks.1.attn1"
    alone = ec.linearize(ec.load_model(model), ec.LinearizeConfig(design="edit", include=(path,)))
    alone.load_state_dict({n: t for n, t in fitted.state_dict().items() if n.startswith(f"{path}.")}, strict=False)
    found = validate(context_of(alone, model), SIDE, SIDE)
    (site,) = [site for site in ranking.sites if site.path == path]
    assert site.measures[0].error == pytest.approx(found.total, rel=1e-4)
    assert site.measures[0].bins == pytest.approx([one.error for one in found.bins], rel=1e-4)


@pytest.mark.slow
def test_what_a_set_saves_is_what_it_is_counted_to_save(ranked, model):
    _, ranking, _ = ranked
    (cost,) = ec.cost(model, [ranking.size], config=ranking.config("best 2")).costs
    assert (cost.before, cost.after) == (ranking.flops, ranking.choose("best 2").flops)


def test_the_chosen_set_is_measured_and_saved(ranked, model):
    folder, ranking, _ = ranked
    (check,) = [check for check in ranking.checked if check.sites == "flops <= 0.95x"]
    selection = ranking.choose("flops <= 0.95x")
    assert check.converted == {path: m.candidate for path, m in selection.converted.items()}
    assert check.predicted == selection.error == pytest.approx(sum(m.error for m in selection.converted.values()))
    student = ec.load(folder / "chosen" / "flops-0.95x", base=ec.load_model(model).model)
    assert check.measured == pytest.approx(validate(context_of(student, model), SIDE, SIDE).total, rel=1e-4)
    assert {site.path for site in ec.plan_of(student).rewritten} == set(selection.converted)
    assert len(ranking.checked) >= 3


def test_the_plan_shows_the_ranking(ranked, model):
    _, ranking, _ = ranked
    plan = ec.plan(model, ranking.config("best 1"))
    (converted,) = plan.rewritten
    assert converted.path == next(iter(ranking.choices.best))
    assert "; rank 1 of 3: error " in converted.reason
    kept = [site.reason for site in plan if not site.rewritten and "attn1" in site.path]
    assert all(reason.startswith("outside the budget (best 1): rank ") and reason.endswith("% of the FLOPs") for reason in kept)
    assert len(kept) == 2


def test_a_finished_ranking_measures_nothing_again(ranked, model, tmp_path, monkeypatch):
    folder = copied(ranked, tmp_path)
    for name in ("Trainer", "error_sums", "cost"):
        monkeypatch.setattr(measuring, name, None)
    monkeypatch.setattr(sets_module, "validate", None)
    with listening(heard := Heard()):
        assert rank(model, folder, sites=["flops <= 0.95x"]) == ranked[1]
    assert not heard.told


def test_a_candidate_that_is_added_is_all_that_is_measured(ranked, model, tmp_path):
    folder, heard = copied(ranked, tmp_path), Heard()
    with listening(heard):
        found = ec.rank(model, folder, recipe=recipe(model), candidates=[{"design": "edit", "reduction": 8}, *COMPETING])
    assert {name for name, *_ in heard.told} == {"edit (reduction=8) (1 of 3)"}
    old = {site.path: [(m.design, m.error) for m in site.measures] for site in ranked[1].sites}
    assert {site.path: [(m.design, m.error) for m in site.measures[1:]] for site in found.sites} == old


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_at(monkeypatch, module, name, number):
    real, calls = getattr(module, name), []

    def dies(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, dies)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (checkpoints, "write_tensors", 2),  # in the middle of the first fit
        (measuring, "save", 1),  # after it
        (measuring, "error_sums", 5),  # among the measurements
        (os, "replace", 14),  # as some file becomes what it is
        (ranking_module, "count_costs", 2),  # before anything is fitted
        (sets_module, "validate", 2),  # among the sets
        (measuring, "load_newest", 2),  # before the second fit
    ],
    ids=lambda value: str(getattr(value, "__name__", value)).rpartition(".")[2],
)
def test_what_is_killed_goes_on_and_comes_out_the_same(ranked, model, tmp_path, monkeypatch, module, name, number):
    with monkeypatch.context() as patch:
        stop_at(patch, module, name, number)
        with pytest.raises(Killed):
            rank(model, tmp_path, sites=["flops <= 0.95x"])
    assert not (tmp_path / "ranking.md").exists()
    assert rank(model, tmp_path, sites=["flops <= 0.95x"]) == ranked[1]


def test_a_signal_stops_between_batches(ranked, model, tmp_path, monkeypatch):
    folder = copied(ranked, tmp_path)
    (folder / "fits" / "edit" / "errors.json").unlink()
    real = measuring.samples_of

    def asked(*args):
        os.kill(os.getpid(), 2)
        return real(*args)

    monkeypatch.setattr(measuring, "samples_of", asked)
    with pytest.raises(ec.Interrupted, match="stopped measuring edit after 1 of 3 batches"):
        rank(model, folder)
    monkeypatch.undo()
    with listening(heard := Heard()):
        assert rank(model, folder).sites == ranked[1].sites
    assert [done for _, _, done, _ in heard.told] == [2, 3]


def test_time_is_measured_where_it_is_asked_for(ranked, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sets_module, "validate", None)  # nothing but time is
    found = rank(model, copied(ranked, tmp_path), time=True)
    assert found.seconds > 0
    assert all(measure.saved_seconds is not None for site in found.sites for measure in site.measures)
    assert [(m.error, m.saved_flops) for s in found.sites for m in s.measures] == [
        (m.error, m.saved_flops) for s in ranked[1].sites for m in s.measures
    ]


def test_a_second_size_has_its_own_numbers_and_what_was_measured_is_kept(ranked, model, tmp_path, monkeypatch):
    folder = copied(ranked, tmp_path)
    found = rank(model, folder, size=(2 * SIDE, 2 * SIDE), sites=["best 1"])
    assert found.flops > 2 * ranked[1].flops
    for check in found.checked:
        assert check.flops == found.choose(check.sites).flops
        assert check.predicted == found.choose(check.sites).error
    assert {check.sites for check in found.checked} == {*found.choices.budgets(4), "best 1"}
    monkeypatch.setattr(sets_module, "validate", None)
    assert rank(model, folder, sites=["flops <= 0.95x"]) == ranked[1]


def test_times_and_sets_outlive_calls_that_do_not_ask_for_them(ranked, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sets_module, "validate", None)
    folder = copied(ranked, tmp_path)
    timed = rank(model, folder, time=True)
    assert rank(model, folder).seconds == timed.seconds
    swapped = ec.rank(model, folder, recipe=recipe(model), candidates=COMPETING[1::-1])
    assert swapped.seconds == timed.seconds
    assert [check.measured for check in swapped.checked] == [check.measured for check in timed.checked]
    monkeypatch.setattr(ranking_module, "machine_in_words", lambda: "another")
    monkeypatch.setattr(measuring, "machine_in_words", lambda: "another")
    assert rank(model, folder, time=True).seconds != timed.seconds


def test_a_fit_of_another_plan_is_not_mixed_with_others(ranked, model, tmp_path):
    folder = copied(ranked, tmp_path)
    index = folder / "fits" / "edit" / "edit_compile.json"
    content = json.loads(index.read_text())
    next(site for site in content["plan"]["sites"] if site["action"] == "edit")["options"]["reduction"] = 2
    index.write_text(json.dumps(content))
    with pytest.raises(ec.DistillError, match=r"fits/edit was fitted with another plan, at transformer_blocks.0.attn1: remove it"):
        rank(model, folder)


def test_the_designs_of_a_recipes_rules_compete(model):
    rules = [{"paths": "*.0.*", "design": "keep"}, {"design": "edit", "options": {"reduction": 8}}, {"design": "kv-compress"}]
    found = ranking_module._candidates_of(recipe(model, convert={"rules": [*rules, rules[1]]}))
    assert [str(candidate) for candidate in found] == ["edit (reduction=8)", "kv-compress"]
    with pytest.raises(ec.ConfigError, match="the recipe's rules keep all sites"):
        ranking_module._candidates_of(recipe(model, convert={"rules": [rules[0]]}))


@pytest.fixture(scope="module")
def of_two_kinds(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "r"
    options = {"recipe": recipe(model), "candidates": ["edit", "mix-ffn"], "sites": ["all"]}
    return folder, ec.rank(model, folder, **options)


@pytest.mark.slow
def test_designs_of_two_kinds_compete(of_two_kinds, model):
    """Feed-forward networks are listed only where a design for them is among the candidates; they save nothing, so budgets leave them."""
    folder, found = of_two_kinds
    blocks = [f"transformer_blocks.{n}.{part}" for n in range(3) for part in ("attn1", "ff")]
    assert [site.path for site in found.sites if site.measures] == blocks
    assert {site.path for site in ec.plan(model, found.config("best 1")).rewritten} == set(list(found.choices.best)[:1])
    everything = ec.load(folder / "chosen" / "all", base=ec.load_model(model).model)
    assert {site.path for site in ec.plan_of(everything).rewritten} == set(blocks)
    (check,) = [check for check in found.checked if check.sites == "all"]
    assert check.measured == pytest.approx(validate(context_of(everything, model), SIDE, SIDE).total, rel=1e-4)


def test_a_second_process_is_refused(ranked, model, tmp_path):
    folder = copied(ranked, tmp_path)
    with claimed(folder / ".lock"), pytest.raises(ec.DistillError, match=r"another process ranks in .*: wait for it"):
        rank(model, folder)


# ------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: {"recipe": recipe(model, seed=1)}, r"begun with other settings: seed \(0 then, 1 now\)"),
        (lambda model: {"steps": 9}, r"layerwise.steps \(4 then, 9 now\)"),
        (lambda model: {"sites": ["flops <= 0.01x"]}, r"sites: flops <= 0.01x: cannot be reached; the least is flops <= 0\.\d+x"),
        (lambda model: {"sites": ["best 7"]}, "only 3 sites save FLOPs"),
        (lambda model: {"sites": ["time <= 0.9x"]}, "time was not measured"),
        (lambda model: {"sites": ["some"]}, "is none of"),
        (lambda model: {"size": (15, 15)}, "does not support 15 x 15 px"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused_in_one_line(ranked, model, tmp_path, change, message):
    options = {"recipe": recipe(model), "candidates": COMPETING} | change(model)
    with pytest.raises(ec.EditCompileError, match=message) as raised:
        ec.rank(model, copied(ranked, tmp_path), **options)
    assert "\n" not in str(raised.value)


def test_other_weights_are_not_taken_for_the_same_model(ranked, model, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model, other)
    moved = ec.load_model(str(other)).model
    toy.shaken(moved, seed=1).save_pretrained(other)
    folder = copied(ranked, tmp_path)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"recipe": settings["recipe"] | {"model": str(other)}}))
    with pytest.raises(ec.DistillError, match="another model's weights"):
        ec.rank(str(other), folder, recipe=recipe(model), candidates=COMPETING)


def test_what_can_be_known_is_told_before_anything_is_fitted(model, tmp_path):
    for change in ({"sites": ["flops <= 0.01x"]}, {"sites": ["best 7"]}, {"size": (15, 15)}, {"sites": ["time <= 0.5x"]}):
        with pytest.raises(ec.EditCompileError):
            rank(model, tmp_path / "r", **change)
    assert not list((tmp_path / "r").glob("fits/*/edit_compile.json"))
    assert not list((tmp_path / "r").glob("fits/*/checkpoints"))


@pytest.mark.slow
def test_a_candidate_that_takes_no_site_is_told_before_anything_is_fitted(model, tmp_path):
    with pytest.raises(ec.ConfigError, match="the candidate mm-edit takes no site of PixArtTransformer2DModel: "):
        ec.rank(model, tmp_path / "r", recipe=recipe(model), candidates=["edit", "mm-edit"])
    assert not (tmp_path / "r" / "fits").exists()


def test_damage_is_named(ranked, model, tmp_path):
    folder = copied(ranked, tmp_path)
    (folder / "fits" / "edit" / "errors.json").write_text("{")
    with pytest.raises(ec.DistillError, match=r"errors.json is damaged: .*; remove it, and what it holds is measured again"):
        rank(model, folder)


def test_models_without_a_shipped_recipe_need_one():
    assert {recipe_for(f"demo/{name}") for name in ("dit", "mm-dit")} == {"demo-dit", "demo-mm-dit"}
    with pytest.raises(ec.ConfigError, match=r"no shipped recipe is for arch/flux-dev: name one with --recipe"):
        recipe_for("arch/flux-dev")


# ------------------------------------------------------------------ recipes and the command line


def test_recipes_take_a_ranking_and_hold_its_rules(ranked, model, tmp_path):
    folder, ranking, _ = ranked
    content = recipe(model).model_dump(mode="json") | {"convert": {"ranking": str(folder / "ranking.json"), "sites": "best 2"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    found = load_recipe(tmp_path / "recipe.yaml")
    assert found.convert == ranking.config("best 2")
    assert ec.Recipe.model_validate(found.model_dump(mode="json")) == found
    content["convert"] = {"sites": "best 2"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ec.RecipeError, match=r"recipe.yaml:\d+: convert: sites: best 2: needs a ranking, which `edit-compile rank MODEL`"):
        load_recipe(tmp_path / "recipe.yaml")


def test_distill_takes_a_ranking_or_what_it_has_fitted(ranked, model, tmp_path):
    folder, ranking, _ = ranked
    chosen = {"ranking": str(folder), "sites": "best 1"}
    result = ec.distill(recipe(model, convert=chosen, layerwise=None), tmp_path / "by-ranking")
    assert [site.path for site in ec.plan_of(result.student).rewritten] == list(ranking.choices.best)[:1]
    fitted = ec.distill(recipe(str(folder / "chosen" / "flops-0.95x"), layerwise=None), tmp_path / "from-fit")
    (check,) = [check for check in ranking.checked if check.sites == "flops <= 0.95x"]
    assert fitted.before.total == pytest.approx(check.measured, rel=1e-4)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_ranks_and_shows_it(ranked, model, tmp_path):
    folder = copied(ranked, tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(model).model_dump(mode="json")))
    candidates = "edit, {design: kv-compress, layer_norm: false}"
    arguments = ("rank", model, "--recipe", tmp_path / "recipe.yaml", "--candidates", candidates, "-o", folder)
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "transformer_blocks.0.attn1" in shown.stdout
    assert {"budget", "predicted", "measured"} <= set(shown.stdout.split())
    assert "of large sets it is too low" in " ".join(shown.stdout.split())
    assert json.loads(run(*arguments, "--sites", "flops <= 0.95x", "--json").stdout) == json.loads(ranked[1].to_json())


@pytest.mark.slow
def test_inspect_and_convert_take_a_ranking(ranked, model, tmp_path):
    folder = ranked[0]
    plan = run("inspect", model, "--ranking", folder / "ranking.json", "--sites", "best 1")
    assert plan.exit_code == 0, plan.stderr
    assert "1 of 6 attention sites rewritten" in plan.stdout
    assert "outside the budget (best 1)" in plan.stdout
    converted = run("convert", model, "--ranking", folder, "-o", tmp_path / "converted", "--json")
    assert json.loads(converted.stdout)["actions"]["keep"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "demo/dit", "--sites", "best 3"), "error: sites: best 3: needs a ranking, which `edit-compile rank MODEL` makes"),
        (("inspect", "demo/dit", "--ranking", "nowhere"), "error: nowhere does not exist; `edit-compile rank MODEL -o"),
        (("inspect", "demo/dit", "--ranking", "nowhere", "--design", "edit"), "error: design beside ranking"),
        (("inspect", "demo/dit", "--set", "sites=all"), "error: --set sites=all: this is the option --sites"),
        (("rank", "arch/flux-dev"), "error: no shipped recipe is for arch/flux-dev: name one with --recipe"),
        (("rank", "demo/dit", "--candidates", "{"), "error: --candidates { is not valid YAML"),
        (("rank", "demo/dit", "--candidates", "edti"), "error: candidates: unknown design 'edti'; did you mean edit"),
        (("rank", "demo/dit", "--sites", "flops <= 0.5"), "error: sites: flops <= 0.5: write flops <= 0.5x"),
    ],
)
def test_the_commands_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*arguments)
    assert found.exit_code == 1
    assert found.stderr.startswith(message)
    assert found.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_demo_model_is_ranked(tmp_path):
    found = ec.rank("demo/dit", tmp_path, steps=3, candidates=["auto"])
    assert len(found.choices.best) == 5
    assert found.config("best 2")
