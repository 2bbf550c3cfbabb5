"""The report: its data and their schema, the page and what it says, the page of a failed build, two bundles side by side."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT, compile_into
from fluxc.base.cache import source_digest
from fluxc.base.errors import BuildError, GateError
from fluxc.cli.main import main
from fluxc.fidelity.gates import STAGES, Bound, check_gates, check_stages
from fluxc.recipe.structs import Gates
from fluxc.report import charts, pictures
from fluxc.report.bundles import report_of
from fluxc.report.compare import compare
from fluxc.report.page import IMAGES, psnr_words, render
from fluxc.report.structs import (
    PAGE,
    REPORT_JSON,
    LayerFigures,
    Report,
    StepCacheFigures,
    Verdict,
    encode_report,
    json_schema,
    read_report,
)
from fluxc.report.tiers import never_run, tiers_of
from fluxc.report.verdict import verdict
from fluxrt.bundle import open_bundle
from fluxrt.manifest import CacheRule, Engine, OnnxRuntimeTarget, Plan, TensorRTRtxTarget
from quick import QUICK

SCHEMA = ROOT / "docs" / "report.schema.json"


class Page(HTMLParser):
    """Every start tag of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(quick_bundle: Path) -> Report:
    return read_report(quick_bundle / REPORT_JSON)


@pytest.fixture(scope="module")
def html(quick_bundle: Path) -> str:
    return (quick_bundle / PAGE).read_text()


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_published_schema_is_that_of_the_structs() -> None:
    """docs/report.md says how it is written anew."""
    assert SCHEMA.read_text() == json_schema()


def test_a_report_validates_against_the_published_schema(quick_bundle: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    plain = json.loads((quick_bundle / REPORT_JSON).read_text(), parse_constant=pytest.fail)
    jsonschema.validate(plain, schema)
    for damage in ({"targets": []}, {"verdict": {"passed": "yes", "gates": []}}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(plain | damage, schema)


def test_the_page_is_made_again_from_the_data_and_the_images_alone(
    quick_bundle: Path, report: Report, html: str
) -> None:
    assert report_of(quick_bundle) == report
    assert render(report, quick_bundle / IMAGES) == html


def test_a_page_holds_all_that_it_shows(html: str) -> None:
    page = Page(html)
    sources = [tag[name] for _, tag in page.tags for name in ("src", "href", "xlink:href", "poster") if tag.get(name)]
    assert sources
    assert [source for source in sources if not source.startswith(("data:image/webp;base64,", "#"))] == []
    assert page.of("link") == page.of("iframe") == []
    assert re.findall(r"@import|url\((?!#)", html) == []
    policy = next(tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_everything_on_a_page_has_words(html: str) -> None:
    """Images have texts, charts a sentence and a table, scrolling regions a name, links a place."""
    page = Page(html)
    images = page.of("img")
    assert len(images) == 2 + 2 * 7
    assert [image for image in images[2:] if not image["alt"]] == []
    charts_shown = [tag for tag in page.of("div") if tag.get("role") == "img"]
    assert len(charts_shown) == 2 * 3
    assert all("aria-label" in tag and len(tag["aria-label"] or "") > 30 for tag in charts_shown)
    assert page.text.count("as a table") + page.text.count("as tables") >= 5
    assert all(
        tag.get("aria-label") and tag.get("tabindex") == "0" for tag in page.of("div") if tag.get("role") == "region"
    )
    ids = [tag["id"] for _, tag in page.tags if tag.get("id")]
    assert len(ids) == len(set(ids))
    assert {tag["href"].removeprefix("#") for tag in page.of("a") if tag.get("href")} <= set(ids)
    assert page.of("html") == [{"lang": "en"}]
    assert any(tag.get("name") == "viewport" for tag in page.of("meta"))


def test_a_page_says_first_what_was_not_run_and_then_what_is_gained(report: Report, html: str) -> None:
    text = Page(html).text
    order = [
        "PASSED",
        "Nothing of this bundle has run on a GPU",
        "How much smaller?",
        "Not measured",
        "A gate is the worst value",
        "held-out prompts, the worst first",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert report.never_run[0] in text
    total = next(size for size in report.sizes if size.component == "all")
    assert f"{100 * (total.planned / total.bf16 - 1):+.0f} %" in text
    for point in report.prediction.points if report.prediction else pytest.fail("no prediction"):
        assert point.gpu in text
    worst = min(figures.image_psnr_db for figures in report.targets.values())
    assert f"{worst} dB" in text
    for layer in report.layers:
        assert layer.name in text
        assert layer.rule in text
    for prompt in report.prompts:
        assert f"--prompt '{prompt}'" in text


def test_the_command_of_an_image_is_the_request_that_was_recorded(quick_bundle: Path, html: str) -> None:
    image = open_bundle(quick_bundle).manifest.images[1]
    height, width = image.size
    words = f"--seed {image.seed} --steps {image.steps} --guidance {image.guidance:g} --size {height}x{width}"
    assert f"{words} --target {image.target}" in Page(html).text


VALUES = st.one_of(st.floats(0, 60, allow_nan=False), st.just(math.nan))


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES),
    st.dictionaries(st.sampled_from(["x", "y"]), st.tuples(VALUES, VALUES, VALUES), min_size=1),
    st.one_of(st.none(), VALUES),
    st.tuples(*[st.one_of(st.none(), st.floats(0, 60))] * 4),
)
def test_a_verdict_passes_where_no_gate_is_missed(
    snr: dict[str, float], found: dict[str, tuple[float, float, float]], cached: float | None, limits: tuple[float, ...]
) -> None:
    gates = Gates(*limits)
    targets = {
        name: {"step_cosine": a, "image_psnr_db": b, **dict.fromkeys(STAGES, c)} for name, (a, b, c) in found.items()
    }
    bounds = {name: dict.fromkeys(STAGES, Bound(30.0, "bfloat16")) for name in targets}
    chosen = None if cached is None else {"psnr_db": cached}
    fails = False
    try:
        check_stages(targets, bounds)
        check_gates(gates, snr, {name: figures | {"prompts": []} for name, figures in targets.items()}, chosen)
    except GateError:
        fails = True
    shown = verdict(gates, snr, targets, bounds, chosen)
    assert shown.passed == (not fails)
    for gate in shown.gates:
        assert gate.passed == (gate.missed == 0)
        if gate.checked == 1 and gate.margin is not None:
            assert gate.passed == (gate.margin >= 0)
        assert gate.value is None or math.isfinite(gate.value)


def test_a_failed_build_leaves_a_page_that_says_so_and_a_good_one_takes_it_away(
    workshop: Path, quick_bundle: Path
) -> None:
    out, failed = workshop / "strict", workshop / "strict-failed"
    with pytest.raises(GateError) as error:
        compile_into(out, *QUICK[:-1], "gates={layer_snr_db: 90, step_cosine: 0.5}")
    assert str(failed / PAGE) in str(error.value)
    assert not out.exists()
    report = read_report(failed / REPORT_JSON)
    assert (report.verdict.passed, report.verdict.gates[0].name) == (False, "layer_snr_db")
    text = Page((failed / PAGE).read_text()).text
    assert "FAILED" in text
    assert "✗ fails" in text
    assert "under layer_snr_db 90" in text
    assert "fails" in text[text.index("layer_snr_db") :]
    shown = run(failed)
    assert shown.exit_code == 0, shown.output
    assert f"FAILED. 1 of {len(report.verdict.gates)} gates failed: layer_snr_db of layer " in shown.output
    both = run(quick_bundle, failed, "--json")
    assert json.loads(both.output)["passed"] == [True, False]
    compile_into(out, *QUICK)
    assert not failed.exists()


def test_a_folder_of_the_same_name_as_a_failed_report_is_left_alone(workshop: Path) -> None:
    ours = workshop / "taken-failed" / "ours.txt"
    ours.parent.mkdir()
    ours.write_text("kept")
    with pytest.raises(GateError) as error:
        compile_into(workshop / "taken", *QUICK[:-1], "gates={layer_snr_db: 90}")
    assert ours.read_text() == "kept"
    assert [path.name for path in ours.parent.iterdir()] == ["ours.txt"]
    (page,) = re.findall(r"\S+index\.html", str(error.value))
    assert "FAILED" in Path(page).read_text()


def test_report_prints_the_place_and_makes_the_page_again(quick_bundle: Path, tmp_path: Path, html: str) -> None:
    shown = run(quick_bundle)
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[0].endswith("passed. All 3 gates hold.")
    assert shown.output.splitlines()[-1] == str(quick_bundle / PAGE)
    out = tmp_path / "new" / "page.html"
    assert run(quick_bundle, "--out", out).exit_code == 0
    assert out.read_text() == html
    printed = run(quick_bundle, "--json")
    assert printed.output_bytes == (quick_bundle / REPORT_JSON).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "missing argument"),
        (["a", "b", "c"], 2, "3 bundles were given; one is shown, or two are compared"),
        (["nowhere"], 1, "no such bundle folder"),
        (["BUNDLE", "nowhere"], 1, "no such bundle folder"),
        (["BUNDLE", "--out", "/proc/page.html"], 1, "/proc"),
        (["BUNDLE", "--out", "FOLDER"], 2, "exists and is not a page"),
    ],
)
def test_what_report_refuses(quick_bundle: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    places = {"BUNDLE": str(quick_bundle), "FOLDER": str(tmp_path)}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output


def test_damaged_reports_and_those_of_an_older_fluxc_are_refused(quick_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    plain = json.loads((quick_bundle / REPORT_JSON).read_text())
    for content, said in (
        (json.dumps({"name": "x", "targets": {}}), "a report of an older fluxc"),
        (json.dumps(plain | {"format_version": 9}), "report format 9, this fluxc reads format 2"),
        (json.dumps(plain | {"steps": "many"}), r"damaged: Expected `int`, got `str` - at `\$.steps`"),
        ("{", "damaged: "),
    ):
        path.write_text(content)
        with pytest.raises(BuildError, match=said):
            read_report(path)
    with pytest.raises(BuildError, match="cannot be read: No such file"):
        read_report(tmp_path / "nothing.json")
    bad = msgspec.structs.replace(read_report(quick_bundle / REPORT_JSON), guidance=math.inf)
    with pytest.raises(BuildError, match="report: guidance came to inf"):
        encode_report(bad)


def test_two_bundles_are_compared_in_recipe_precision_sizes_and_figures(
    quick_bundle: Path, report: Report, tmp_path: Path
) -> None:
    """The second has bf16 where the first has NVFP4, in layers that are named."""
    kept = [layer.name for layer in report.layers if layer.format == "nvfp4"][:2]
    layers = tuple(
        msgspec.structs.replace(layer, format="bf16", rule="exclude 'x'") if layer.name in kept else layer
        for layer in report.layers
    )
    sizes = tuple(msgspec.structs.replace(size, planned=2 * size.planned) for size in report.sizes)
    other = msgspec.structs.replace(
        report, name="other", layers=layers, sizes=sizes, recipe=report.recipe | {"text": {"length": 64}}, steps=9
    )
    found = compare(report, other, ("a", "b"))
    assert [(x.layer, x.first, x.second, x.second_rule) for x in found.precision] == [
        (name, "nvfp4", "bf16", "exclude 'x'") for name in kept
    ]
    assert [(x.field, x.first, x.second) for x in found.recipe] == [("text.length", 32, 64)]
    assert "differ in steps" in found.comparable
    weights = next(figure for figure in found.figures if figure.what == "weights: all")
    assert weights.second == 2 * (weights.first or 0)
    copy = shutil.copytree(quick_bundle / "report", tmp_path / "other-failed" / "report")
    (copy / "report.json").write_bytes(encode_report(other))
    printed = run(quick_bundle, copy.parent)
    assert printed.exit_code == 0, printed.output
    for words in ("+100.0 %", "text.length", f"transformer: {kept[0]}", "differ in steps"):
        assert words in printed.output
    out = tmp_path / "both.html"
    assert run(quick_bundle, copy.parent, "--out", out).output.strip() == str(out)
    page = Page(out.read_text())
    assert len(page.of("img")) == len(report.prompts) * (1 + 2 * len(report.targets))
    assert all(tag["alt"] and (tag["src"] or "").startswith("data:") for tag in page.of("img"))
    assert kept[1] in page.text


def test_a_bundle_equals_itself(quick_bundle: Path) -> None:
    printed = run(quick_bundle, quick_bundle)
    assert "The recipes are equal." in printed.output
    assert "Every Linear is stored in the same format by the same rule." in printed.output


def test_charts_are_the_same_bytes_in_the_pages_own_colours(report: Report) -> None:
    first, second = (charts.layers_chart(report) for _ in range(2))
    assert first is not None
    assert first == second
    for svg in (first.wide, first.narrow):
        assert not re.search(r"#0\d0[0-9]0[0-9]|#000000|<metadata|<\?xml|DOCTYPE", svg)
        assert "var(--c1)" in svg
        assert svg.count("<title>") == min(charts.MOST_LAYERS, sum(x.snr_db is not None for x in report.layers))
    assert "SNR, dB" in first.wide


def test_the_digest_of_a_package_is_of_its_styles_and_scripts_too(tmp_path: Path) -> None:
    (tmp_path / "page.py").touch()
    seen = {source_digest(tmp_path)}
    for name in ("page.css", "page.js", "page.html.j2"):
        (tmp_path / name).write_text("x")
        seen.add(source_digest(tmp_path))
    assert len(seen) == 4


def test_names_from_a_recipe_stay_text(report: Report, quick_bundle: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    layer = msgspec.structs.replace(next(x for x in report.layers if x.snr_db is not None), rule=evil, snr_db=1.0)
    named = msgspec.structs.replace(report, name=evil, layers=(layer,), prompts=(evil, '"><img src=x>'))
    page = render(named, quick_bundle / IMAGES)
    assert len(Page(page).of("script")) == 1
    assert evil not in page
    assert all((tag.get("src") or "data:").startswith("data:") for tag in Page(page).of("img"))


def test_layers_without_figures_are_told_apart(report: Report, quick_bundle: Path) -> None:
    """Kept as they were, quantized without any error, or quantized by the checkpoint's makers."""
    plain: dict[str, Any] = {"component": "transformer", "shape": (4, 4), "group": None, "bytes_before": 1}
    plain |= {"bytes_after": 1, "rule": "default"}
    layers = (
        LayerFigures(name="kept", format="bf16", **plain),
        LayerFigures(name="exact", format="mxfp4", scales="max", **plain),
        LayerFigures(name="theirs", format="nvfp4", quantized_in_checkpoint=True, **plain),
    )
    text = Page(render(msgspec.structs.replace(report, layers=layers), quick_bundle / IMAGES)).text
    assert "This build quantized no layer." in text
    for name, words in (("kept", "kept"), ("exact", "no error"), ("theirs", "quantized in the checkpoint")):
        assert words in text[text.index(f"transformer: {name}") :][:200]


def test_a_page_of_what_ran_nowhere_says_what_was_not_measured(report: Report, quick_bundle: Path) -> None:
    quality = {"coefficients": [1.0, 0.0], "r2": 0.9, "r2_by_branch": [0.9], "rmse": 0.1, "worst": 0.2}
    skips = {"dynamic": {"fitted": 2.0, "held_out": 1.9}, "visual_gen": {"held_out": 1.5}}
    fit = {
        "degree": 1,
        "kind": "plain",
        "prompts": {"fitted": 6, "held_out": 2},
        "range": [0.1, 0.2],
        "occurrences": [],
    }
    fit |= {"residual": quality, "latent": quality, "skipped": skips}
    rule = CacheRule((1.0, 0.0), 0.5)
    cache = StepCacheFigures(mode="dynamic", steps=9, size=(64, 64), schedule=(), rule=rule, visual_gen=rule, fit=fit)
    gone = Verdict(passed=True, gates=())
    nowhere = msgspec.structs.replace(report, targets={}, prediction=None, step_cache=cache, verdict=gone)
    text = Page(render(nowhere, quick_bundle / IMAGES)).text
    for said in ("what it costs was not measured", "can share the model", "has no gates", "reference"):
        assert said in text
    assert "Is it still good?" not in text


def test_large_images_are_shrunk_and_small_ones_kept_exactly(report: Report, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side, kept in ((64, 64), (1024, 512)):
        pixels = rng.integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "reference-0.png")
        shown = pictures.recorded(tmp_path, "reference", 0, "a prompt", "reference")
        raw = base64.b64decode(shown.uri.partition(",")[2])
        (tmp_path / "shown.webp").write_bytes(raw)
        with Image.open(tmp_path / "shown.webp") as image:
            assert image.size == (kept, kept)
            if side == kept:
                assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


def test_maps_are_black_where_images_are_equal_and_white_where_they_differ_most(
    quick_bundle: Path, report: Report, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(quick_bundle / IMAGES, tmp_path / "images"))
    with Image.open(images / "reference-0.png") as image:
        pixels = np.asarray(image.convert("RGB")).copy()
    pixels[3, 5] = (pixels[3, 5].astype(int) + 100) % 256
    Image.fromarray(pixels).save(images / "onnxruntime-0.png")
    row = next(row for row in pictures.rows(report, images) if row.number == 0)
    shown = next(picture for picture in row.pictures if picture.title == "difference: onnxruntime")
    (tmp_path / "map.webp").write_bytes(base64.b64decode(shown.uri.partition(",")[2]))
    with Image.open(tmp_path / "map.webp") as image:
        found = np.asarray(image.convert("L"))
    assert np.argwhere(found).tolist() == [[3, 5]]
    assert found.max() > 150
    assert "of 255 levels" in shown.alt


@pytest.mark.parametrize(
    ("psnr", "words"), [(120, "equal"), (42.7, "1.9 of 255"), (33, "hardly side by side"), (18, "it shows")]
)
def test_a_psnr_in_words(psnr: float, words: str) -> None:
    assert words in psnr_words(psnr)


def test_tiers_of_targets_that_did_not_run() -> None:
    unfinished = Plan("a.onnx", None, (), (), (), ())
    done = msgspec.structs.replace(unfinished, file="a.plan")
    plans = {"none": {"p": unfinished}, "some": {"p": unfinished, "q": done}, "all": {"p": done}}
    audit = {"all": {"p": {"read": "program"}}}
    targets = [
        TensorRTRtxTarget(name, Engine("tensorrt_rtx", "1", ("12.0",), found, {}, audit=audit.get(name, {})))
        for name, found in plans.items()
    ]
    cpu = OnnxRuntimeTarget("cpu", "none", {})
    tiers = tiers_of((*targets, cpu), {"cpu": False}, ())
    assert [(tier.built, tier.audited, tier.ran, tier.matched, tier.on_target) for tier in tiers] == [
        ("no", "no", "no", "no", "no"),
        ("partly", "no", "no", "no", "no"),
        ("yes", "yes", "no", "no", "no"),
        ("yes", "does not apply", "yes", "no", "yes"),
    ]
    said = never_run(tiers, (), "images")
    assert said[0].startswith("Nothing of this bundle has run on a GPU.")
    assert said[1:] == (
        "none: its engines are not built yet; `fluxc finish` builds them on the GPU they are for",
        "some: its engines are not built yet; `fluxc finish` builds them on the GPU they are for",
        "all: built and audited, but no GPU has run it",
    )
