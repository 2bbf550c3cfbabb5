"""`fluxc tune`: the choice against brute force, the frontier, the recipe that is written, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from conftest import RECIPE
from fluxc.base.progress import StageProgress
from fluxc.build.build import build
from fluxc.calibrate.choice import Groups, Limits, Option, Setting, choose, choose_of, frontier_of
from fluxc.calibrate.tuning_stage import sources_of
from fluxc.cli.main import main
from fluxc.recipe.edit import write_with_formats
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import StepRule
from fluxc.report.structs import REPORT_JSON
from fluxrt.bundle import open_bundle
from quick import QUICK

FORMATS = ("nvfp4", "nvfp4-w4a16", "fp8")


def random_groups(seed: int, count: int) -> Groups:
    """Formats that cost error save time or memory, most of the time."""
    rng = np.random.default_rng(seed)
    return [
        [Option("bf16", 0.0, 0.0, 0.0)]
        + [
            Option(name, float(rng.exponential()), float(rng.normal(-1, 1)), float(rng.normal(-2, 1)))
            for name in FORMATS
        ]
        for _ in range(count)
    ]


def sums(groups: Groups, picks: tuple[int, ...] | list[int]) -> dict[str, float]:
    taken = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    return {name: sum(getattr(option, name) for option in taken) for name in ("cost", "seconds", "weights")}


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    groups = random_groups(seed, 5)
    every = [sums(groups, picks) for picks in itertools.product(range(4), repeat=5)]
    for limits, aim in (
        (Limits(seconds=-2.0), "cost"),
        (Limits(weights=-6.0), "cost"),
        (Limits(seconds=-1.0, weights=-4.0), "cost"),
        (Limits(cost=1.5), "seconds"),
    ):
        allowed = [
            found for found in every if all(most is None or found[name] <= most for name, most in vars(limits).items())
        ]
        picks = choose(groups, limits)
        if not allowed:
            assert picks is None
            continue
        assert picks is not None
        found = sums(groups, picks)
        assert all(most is None or found[name] <= most + 1e-6 for name, most in vars(limits).items())
        assert found[aim] == pytest.approx(min(other[aim] for other in allowed), abs=1e-3)


def test_under_an_error_there_may_be_the_least_memory() -> None:
    groups = random_groups(1, 5)
    every = [sums(groups, picks) for picks in itertools.product(range(4), repeat=5)]
    picks = choose(groups, Limits(cost=1.5), "weights")
    assert picks is not None
    least = min(found["weights"] for found in every if found["cost"] <= 1.5)
    assert sums(groups, picks)["weights"] == pytest.approx(least, abs=1e-3)


@pytest.mark.parametrize("axis", ["seconds", "weights"])
def test_the_frontier_goes_from_least_to_no_error(axis) -> None:
    groups = random_groups(2, 12)
    found = [sums(groups, picks) for _, picks in frontier_of({(0, 0): groups}, axis)]
    assert found[0][axis] == pytest.approx(sum(min(getattr(o, axis) for o in group) for group in groups), abs=1e-4)
    assert found[-1]["cost"] == pytest.approx(0, abs=1e-6)
    for one, other in itertools.pairwise(found):
        assert one[axis] < other[axis] + 1e-9
        assert one["cost"] > other["cost"] - 1e-6


def test_many_groups_of_few_kinds_are_chosen_quickly(capfd: pytest.CaptureFixture[str]) -> None:
    """As a large model has them: programs with many choices that are all but equal. What the solver prints is no result."""
    rng = np.random.default_rng(6)
    space: dict[Setting, Groups] = {}
    for steps in (0, 2, 4, 8, 12):
        space[0, steps] = []
        for number in range(160):
            near, seconds = 1 + 0.01 * rng.normal(), -1.0 - number % 4
            options = [Option("bf16", 0.0, 0.0, 0.0), Option("nvfp4", near, seconds, -3.0)]
            if steps:
                options.append(
                    Option("nvfp4", near * (1 - steps / 16), seconds * (1 - steps / 24), -3.0, is_exact=True)
                )
            space[0, steps].append(options)
    found = frontier_of(space)
    assert len(found) == 9
    print("a result")
    assert capfd.readouterr() == ("a result\n", "")


def test_no_choice_meets_what_is_impossible() -> None:
    assert choose(random_groups(3, 4), Limits(seconds=-1000.0)) is None
    assert choose_of({(0, 0): random_groups(3, 4)}, Limits(seconds=-1000.0)) is None
    assert frontier_of({(0, 0): random_groups(3, 4)}, "seconds", Limits(weights=-1000.0)) == []


@pytest.mark.parametrize("limits", [Limits(seconds=-4.0), Limits(seconds=-3.0, weights=-6.0), Limits(cost=1.0)])
def test_the_number_of_steps_is_the_best_of_all(limits: Limits) -> None:
    """Programs of several numbers of steps against all choices of all of them."""
    plain, rng = random_groups(4, 4), np.random.default_rng(5)
    space: dict[Setting, Groups] = {(0, 0): plain}
    for steps in (1, 3):
        share = steps / 6
        space[0, steps] = [
            [
                *options,
                replace(options[1], cost=(1 - share) * options[1].cost, seconds=options[1].seconds + w, is_exact=True),
            ]
            for options, w in zip(plain, share * rng.exponential(size=4), strict=True)
        ]
    # Of six steps one is skipped: everything takes five sixths of the time, and what layers save.
    space[1, 0] = [
        *([replace(one, seconds=one.seconds * 5 / 6) for one in options] for options in plain),
        [Option("", 0.3, -1.5, 0.0)],
    ]
    every = [
        sums(groups, picks)
        for groups in space.values()
        for picks in itertools.product(*(range(len(options)) for options in groups))
    ]
    aim = "cost" if limits.cost is None else "seconds"
    allowed = [
        found for found in every if all(most is None or found[name] <= most for name, most in vars(limits).items())
    ]
    chosen = choose_of(space, limits)
    assert chosen is not None
    assert sums(space[chosen[0]], chosen[1])[aim] == pytest.approx(min(found[aim] for found in allowed), abs=1e-3)
    frontier = [
        sums(space[steps], picks) for steps, picks in frontier_of(space, "seconds", Limits(weights=limits.weights))
    ]
    assert all(limits.weights is None or found["weights"] <= limits.weights + 1e-6 for found in frontier)
    for one, other in itertools.pairwise(frontier):
        assert one["cost"] > other["cost"] - 1e-6


def test_a_recipe_gets_the_steps_that_were_chosen(tmp_path: Path) -> None:
    recipe, out = tmp_path / "one.yaml", tmp_path / "two.yaml"
    text = (
        "name: one\nsizes: [[64, 64]]\nmodel: {source: ../models/flux2-nano}\nsampling: {steps: 8}\n"
        "calibration: {prompts: a.txt}\nfidelity: {level: none}\ntargets: [{kind: tensorrt_rtx}]\n"
    )
    recipe.write_text(text, encoding="utf-8")
    chosen = {"transformer_blocks.0.attn.to_q": "nvfp4"}
    write_with_formats(recipe, (), chosen, out, [{"at": [2, 8], "layers": ["transformer_blocks.0.attn.to_q"]}])
    (rule,) = load_recipe(out).recipe.precision.steps
    assert isinstance(rule, StepRule)
    assert (rule.numbers(8), rule.layers) == ([1, 7], ("transformer_blocks.0.attn.to_q",))


@pytest.mark.parametrize(
    ("before", "skip", "after"),
    [
        ("", 3, {"skip": 3}),
        ("step_cache: {max_error: 0.1, last: 2}\n", 3, {"last": 2, "skip": 3}),
        ("step_cache: {skip: auto, mode: dynamic}\n", 2, {"skip": 2, "mode": "dynamic"}),
        ("step_cache: {last: 2}\ngates: {step_cache_psnr_db: 30}\n", 0, None),
        ("step_cache: {skip: 4}\n", None, {"skip": 4}),
    ],
)
def test_a_recipe_gets_the_number_of_skipped_steps(
    tmp_path: Path, before: str, skip: int | None, after: dict | None
) -> None:
    recipe, out = tmp_path / "one.yaml", tmp_path / "two.yaml"
    text = (
        "name: one\nsizes: [[64, 64]]\nmodel: {source: ../models/flux2-nano}\nsampling: {steps: 12}\n"
        "calibration: {prompts: a.txt}\nfidelity: {prompts: a.txt}\ntargets: [{kind: onnxruntime}]\n"
    )
    recipe.write_text(text + before, encoding="utf-8")
    write_with_formats(recipe, (), {"proj_out": "bf16"}, out, (), skip)
    assert YAML(typ="safe").load(out.read_text()).get("step_cache") == after
    assert (load_recipe(out).recipe.step_cache is None) == (after is None)


def test_a_skipped_step_takes_from_the_last_that_is_computed() -> None:
    assert sources_of((2, 3, 5), 7) == [0, 1, 1, 1, 4, 4, 6]


def test_a_recipe_keeps_its_comments_and_everything_else(tmp_path: Path) -> None:
    text = (
        "# mine\nname: one  # short\nsizes: [[64, 64]]\nmodel: {source: ../models/flux2-nano}\n"
        "precision:\n  transformer:\n    default: nvfp4\n    exclude: auto  # measured\n    budget: {share: 0.1}\n"
        "    rules: [{match: x_embedder, format: bf16}, {match: proj_out, format: fp8}]\n"
        "calibration: {prompts: a.txt}\nfidelity: {level: none}\ntargets: [{kind: onnxruntime}]\n"
    )
    recipe, out = tmp_path / "one.yaml", tmp_path / "two.yaml"
    recipe.write_text(text, encoding="utf-8")
    chosen = {"transformer_blocks.0.attn.to_q": "fp8", "proj_out": "bf16"}
    write_with_formats(recipe, ("sampling.steps=7",), chosen, out)
    loaded = load_recipe(out).recipe
    rules = [(rule.match, rule.format) for rule in loaded.precision.transformer.rules]
    assert rules == [*chosen.items(), ("x_embedder", "bf16"), ("proj_out", "fp8")]
    assert (loaded.precision.transformer.exclude, loaded.precision.transformer.budget) == ((), None)
    assert loaded.sampling.steps == 7
    assert "# mine\n" in out.read_text()
    assert "# short" in out.read_text()
    assert recipe.read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.yaml", "two.yaml"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux2-nano's recipe in a folder of its own, with absolute paths."""
    folder = tmp_path_factory.mktemp("tune")
    data = folder.parent / "prompts.txt"
    data.write_text((RECIPE.parent.parent / "tests" / "data" / "two-prompts.txt").read_text())
    text = RECIPE.read_text().replace("../models", str(RECIPE.parent.parent / "models"))
    for name in ("calibration", "held-out"):
        text = text.replace(f"prompts/flux2-nano-{name}.txt", str(data))
    (folder / "nano.yaml").write_text(text)
    known = (RECIPE.parent / "prompts" / "flux2-nano-steps.txt").read_text().splitlines()
    lines = [line for line in known if line and not line.startswith("#")][:8]
    (folder / "eight.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder / "nano.yaml"


def run(*arguments: str):
    return CliRunner().invoke(main, ["tune", *arguments])


SETTINGS = [a for change in QUICK if "prompts" not in change for a in ("--set", change)]


@pytest.fixture(scope="module")
def tuned(copied: Path) -> tuple[dict, Path]:
    out = copied.with_name("nano-tuned.yaml")
    found = run(str(copied), *SETTINGS, "--on", "b200", "--error", "0.05", "--least", "memory", "--json", "-q")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout), out


def test_costs_of_layers_add_up_to_what_is_measured(tuned: tuple[dict, Path]) -> None:
    found, _ = tuned
    assert found["gpu"] == "B200"
    points = found["frontier"]
    assert len(points) >= 5
    for point in points:
        assert point["error"] == pytest.approx(point["predicted_error"], rel=0.25, abs=1e-6)
    assert [point["weights"] for point in points] == sorted(point["weights"] for point in points)
    assert found["chosen"]["predicted_error"] <= 0.05
    smaller = [point for point in points if point["weights"] < found["chosen"]["weights"]]
    assert all(point["predicted_error"] > 0.05 for point in smaller)


def test_the_page_beside_the_recipe_shows_every_choice(tuned: tuple[dict, Path]) -> None:
    found, recipe = tuned
    page = recipe.with_suffix(".html").read_text(encoding="utf-8")
    for point in (*found["frontier"], found["chosen"]):
        words = f"error {point['error']:.4f} ({point['predicted_error']:.4f} added up)"
        assert page.count(words) >= 2  # in the chart for a page, and in that for a phone
        assert f'<td class="n">{point["predicted_error"]:.4f}</td>' in page
    for layer, format in found["rules"].items():
        assert f'<th scope="row">{layer}</th><td>{format}</td>' in page
    assert not re.search("https?:", re.sub(r'xmlns(:xlink)?="[^"]*"', "", page))


def test_what_was_chosen_is_what_a_build_makes(tuned: tuple[dict, Path], tmp_path: Path) -> None:
    found, recipe = tuned
    one = "targets=[{kind: onnxruntime, activations: nvfp4}]"
    bundle = build(load_recipe(recipe, (*QUICK[2:], one)), tmp_path / "bundle", StageProgress())
    assert bundle is not None
    layers = {layer.name: layer.format for layer in open_bundle(bundle).manifest.precision}
    assert {name: layers[name] for name in found["rules"]} == found["rules"]
    error = json.loads((bundle / REPORT_JSON).read_text())["targets"]["onnxruntime-nvfp4"]["step_error"]
    assert error < 3 * found["chosen"]["error"]


def test_the_table_says_what_is_predicted_and_what_measured(copied: Path, tuned: tuple[dict, Path]) -> None:
    out = copied.with_name("again.yaml")
    wish = ["--error", "0.05", "--least", "memory", "--out", str(out)]
    found = run(str(copied), *SETTINGS, "--on", "b200", *wish, "-q")
    assert found.exit_code == 0, found.output
    assert "PREDICTED" in found.stdout
    assert "error, measured" in " ".join(found.stdout.split())
    assert found.stdout.rstrip().endswith("again.yaml")
    assert "No step is skipped: step_cache: 3 steps are too few to skip any" in " ".join(found.stdout.split())
    assert out.read_text() == tuned[1].read_text()
    asked = run(
        str(copied), *SETTINGS, "--on", "b200", *wish[:-1], str(out.with_name("asked.yaml")), "--no-skips", "-q"
    )
    assert "No step is skipped, as asked." in asked.stdout


RULED = (
    "precision.transformer.default=bf16",
    "precision.transformer.rules=[{match: 'transformer_blocks.1.*', format: nvfp4}]",
)


@pytest.mark.parametrize(("asked", "error"), [((), "0.03"), (RULED, "0.01")], ids=["by default", "by rules"])
def test_a_build_of_what_was_written_measures_and_solves_nothing_again(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], error: str
) -> None:
    """Started where `tune` was, without --out; also where the choice takes layers away from the rules that were there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLUXC_CACHE")
    out = copied.with_name(f"solved-{len(asked)}.yaml")
    changes = [a for change in ("precision.transformer.rounding=gptq", *asked) for a in ("--set", change)]
    wish = ["--on", "b200", "--formats", "nvfp4", "--error", error, "--least", "memory", "--out", str(out), "-q"]
    found = run(str(copied), *SETTINGS, *changes, *wish)
    assert found.exit_code == 0, found.output
    chosen = {rule.format for rule in load_recipe(out).recipe.precision.transformer.rules[:-1]}
    assert chosen == {"nvfp4", "bf16"}
    found = CliRunner().invoke(main, ["plan", str(out), "--json"])
    assert found.exit_code == 0, found.output
    stages = {stage["name"]: stage["result"] for stage in json.loads(found.stdout)["budget"]["stages"]}
    assert stages["calibrate"] == stages["rounding-transformer"] == "cached"
    assert stages["weights-transformer"] == "to run"


TEN_STEPS = ("--set", "sampling.steps=10")
FEW = [word for change in RULED for word in ("--set", change)]
"""One block is quantized."""

EIGHT = [
    *("--set", "calibration.prompts=eight.txt"),
    *TEN_STEPS,
    *("--set", "calibration.steps=3"),
    *("--set", "fidelity.prompts=eight.txt"),
    *("--set", "fidelity.max_prompts=2"),
    *("--set", "precision.transformer.scales=max"),
    *("--set", "gates={}"),
    *("--set", "targets=[{kind: onnxruntime, activations: nvfp4}]"),
    *("--set", "precision.transformer.default=bf16"),
    *("--set", "precision.transformer.rules=[{match: 'single_transformer_blocks.*', format: nvfp4}]"),
]
"""Enough prompts for a step cache, and not too many layers."""


@pytest.fixture(scope="module")
def skipping(copied: Path) -> tuple[dict, Path]:
    """A choice that has to be small and fast: flux2-nano is smaller in NVFP4, and faster only with fewer steps."""
    out = copied.with_name("nano-skipping.yaml")
    wish = ["--time", "0.12", "--gpu-memory", "0.0093", "--formats", "nvfp4,nvfp4-w4a16", "--out", str(out)]
    found = run(str(copied), *EIGHT, "--on", "rtx-5090", *wish, "--json", "-q")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout), out


def test_skipped_steps_are_a_part_of_the_choice(skipping: tuple[dict, Path]) -> None:
    found, _ = skipping
    for point in (*found["frontier"], found["chosen"]):
        # Costs of layers at a step are taken to be those of others that skip it; that of the residual adds up.
        assert point["error"] == pytest.approx(point["predicted_error"], rel=0.25, abs=1e-6)
    assert found["chosen"]["seconds"] <= 0.12e-3
    assert found["chosen"]["skipped"] == found["skipped"] != []
    assert 0 < len(found["chosen"]["choice"]) <= len(found["rules"])
    assert len({len(point["skipped"]) for point in found["frontier"]}) >= 4
    by_time = sorted(found["frontier"], key=lambda point: point["seconds"])
    assert by_time[0]["error"] > by_time[-1]["error"]
    slow = [point for point in found["frontier"] if not point["skipped"]]
    assert all(point["seconds"] > 0.12e-3 for point in slow)


def test_what_skips_is_what_a_build_makes(skipping: tuple[dict, Path], tmp_path: Path) -> None:
    found, recipe = skipping
    bundle = build(load_recipe(recipe), tmp_path / "bundle", StageProgress())
    assert bundle is not None
    manifest = open_bundle(bundle).manifest
    assert manifest.step_cache is not None
    assert (manifest.step_cache.mode, len(manifest.step_cache.schedule)) == ("static", len(found["skipped"]))
    formats = {layer.name: layer.format for layer in manifest.precision}
    assert {name: formats[name] for name in found["rules"]} == found["rules"]


def test_too_few_prompts_for_a_step_cache_are_said(copied: Path) -> None:
    out = copied.with_name("none-skipped.yaml")
    wish = ["--error", "0.05", "--least", "memory", "--formats", "nvfp4", "--out", str(out)]
    found = run(str(copied), *SETTINGS, *TEN_STEPS, *FEW, "--on", "b200", *wish, "-q")
    assert found.exit_code == 0, found.output
    assert "No step is skipped: calibration.prompts: 2 prompts are too few" in " ".join(found.stdout.split())
    assert load_recipe(out).recipe.step_cache is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--on", "b200"], 2, "give --time, --gpu-memory or both of them, or --error"),
        (["--on", "b200", "--time", "1", "--error", "0.1"], 2, "give --time, --gpu-memory or both of them, or --error"),
        (["--on", "h100", "--error", "0.1", "--formats", "nvfp4"], 2, "H100 SXM does not multiply nvfp4; give some of"),
        (
            ["--on", "b200", "--error", "0.1", "--formats", "nvpf4"],
            2,
            "there is no format 'nvpf4'; did you mean 'nvfp4'",
        ),
        (["--on", "b200", "--error", "0.1", "--out", "elsewhere/x.yaml"], 2, "a recipe's paths start from its folder"),
        (["--on", "b200", "--error", "0.1", "--out", "SELF"], 2, "exists already, and is not overwritten"),
        (["--on", "b200", "--error", "0.1", "--out", "tuned.html"], 2, "is the name of the page beside the recipe"),
        (["--on", "b200", "--error", "0.1", "--set", "precision.transformer.default=bf16"], 2, "nothing to choose"),
        (["--on", "b200", "--error", "0.1", "--set", "calibration.engine=none"], 2, "engine: none: formats are"),
        (["--on", "b200", "--error", "0.1", "--set", "precision.steps=[{last: 1}]"], 2, "tune chooses steps itself"),
        (
            ["--on", "b200", "--error", "0.1", *TEN_STEPS, "--set", "step_cache.skip=1"],
            2,
            "tune chooses how many steps are skipped",
        ),
        (
            ["--on", "b200", "--error", "0.1", *TEN_STEPS, "--set", "step_cache.trace=a"],
            2,
            "step_cache.trace: is of the model in",
        ),
    ],
)
def test_wrong_requests_are_refused(
    copied: Path, tmp_path: Path, arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    before = sorted(copied.parent.iterdir())
    words = [word.replace("SELF", str(copied)) for word in arguments]
    if "--out" not in words:
        words += ["--out", str(copied.with_name("refused.yaml"))]
    found = run(str(copied), *SETTINGS, *words, "-q")
    assert found.exit_code == code, found.output
    assert said in found.stderr
    assert "Traceback" not in found.stderr
    made = [path for path in sorted(copied.parent.iterdir()) if path not in before]
    assert [path for path in made if path.suffix in {".yaml", ".html"}] == []


def test_too_little_memory_is_refused_at_once(copied: Path) -> None:
    wish = ["--error", "0.1", "--memory", "300MiB", "--out", str(copied.with_name("small.yaml"))]
    found = run(str(copied), *SETTINGS, "--on", "b200", *wish, "-q")
    assert found.exit_code == 1
    assert "stage tune needs" in found.stderr


def test_a_wish_that_nothing_meets_names_the_best(copied: Path, tuned: tuple[dict, Path]) -> None:
    out = ["--out", str(copied.with_name("never.yaml"))]
    found = run(str(copied), *SETTINGS, "--on", "b200", "--gpu-memory", "0.0001", *out, "-q")
    assert found.exit_code == 1
    assert "the smallest takes" in found.stderr
    found = run(str(copied), *SETTINGS, "--on", "b200", "--time", "0.000001", *out, "-q")
    assert found.exit_code == 1
    assert "the fastest takes" in found.stderr
    assert not copied.with_name("never.yaml").exists()
    assert tuned
