"""The report as a page: the facts of the JSON, nothing executed, nothing loaded; read in a real browser."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import tiny
from flashnorm.convert.whole import convert
from flashnorm.errors import InputError
from flashnorm.verify.findings import Finding
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.page import check_page, html, write_page
from flashnorm.verify.plots import error_by_depth, kl_by_token, rounding_errors
from flashnorm.verify.report import VerifyReport
from flashnorm.verify.returned import Errors, Returned, ReturnedReport
from flashnorm.verify.whole import verify

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<script>alert(1)</script>'\"&{{ 7 * 7 }}"
VOID = {"meta", "link", "br", "path", "use"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model, some of whose norms stay, and its conversion."""
    folder = tmp_path_factory.mktemp("page")
    source = tiny.save(folder / "source", tiny.model(tiny.config("qwen3", num_hidden_layers=3), torch.bfloat16))
    convert(source, folder / "converted")
    return source, folder / "converted"


@pytest.fixture(scope="module")
def report(folders: tuple[Path, Path]) -> VerifyReport:
    return verify(*folders)


def outputs(report: VerifyReport) -> OutputsReport:
    assert report.outputs is not None
    return report.outputs


def nasty(report: VerifyReport) -> VerifyReport:
    """The same with markup wherever a checkpoint or its tokenizer has a say."""
    found = outputs(report)
    assert found.greedy is not None
    conversion = report.conversion
    (name, kept), *_ = conversion.plan.kept.items()
    return replace(
        report,
        source=NASTY,
        converted=NASTY,
        conversion=replace(
            conversion,
            source_id=NASTY,
            plan=replace(conversion.plan, model_type=NASTY, kept={name + NASTY: replace(kept, reason=NASTY)}),
        ),
        weights=replace(report.weights, findings=(Finding("tensor", NASTY, "is missing"),), problems=120),
        outputs=replace(
            found,
            logits=tuple(replace(logit, context=NASTY, token_text=NASTY) for logit in found.logits),
            greedy=replace(found.greedy, source_text=NASTY, converted_text=NASTY + "!", converted=(1,)),
        ),
    )


def other(report: VerifyReport) -> VerifyReport:
    """The report of a model that is no causal language model, with markup where it has a say."""
    small, large = Errors(0.01, 0.008), Errors(0.7, 0.7)
    returned = (
        Returned(f"forward: {NASTY}", 1000, small, small, small, (small, small)),
        Returned("forward: mask", 20, large, large, small, (small, large)),
    )
    criteria = outputs(report).criteria[:2]
    return replace(report, outputs=ReturnedReport("ViTMAEModel", "bfloat16", False, returned, criteria))


class Elements(HTMLParser):
    """The names of a page's elements, their attributes and its text; what is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.opened: list[str] = []
        self.feed(page)
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_json_is_as_its_schema_says(folders: tuple[Path, Path], report: VerifyReport) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    skipped = replace(report, outputs=OutputsReport(skipped="it does not fit"))
    for each in (report, nasty(report), skipped, other(report), verify(*folders, weights_only=True)):
        validator.validate(json.loads(each.to_json()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(report.to_dict() | {"version": 2})


@pytest.mark.slow
def test_the_page_has_the_facts_of_the_report(report: VerifyReport) -> None:
    page = Elements(html(report))
    text = " ".join(page.text.split())
    assert report.verdict in text
    for sentence in report.unchecked:
        assert sentence[1:] in text
    for criterion in outputs(report).criteria:
        assert criterion.found in text
    for fact in ("model.layers 0-2", "self_attn.q_proj.weight", "lm_head.weight", "self_attn.q_norm.weight"):
        assert fact in text
    assert text.count("stayed: it adds channels that carry different elements of the gain (aten.add,") == 2
    assert f"{outputs(report).oracle_perplexity:.4f}" in text
    for label in ("(nats)", "(tokens)", "units of the last place", "(layers;"):
        assert label in text
    assert "svg" in page.names


def test_nothing_is_loaded_and_nothing_executed(report: VerifyReport) -> None:
    for page in (Elements(html(report)), Elements(html(nasty(report)))):
        assert not page.names & {"script", "img", "iframe", "object", "embed", "form", "base", "audio", "video"}
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        links = [value for name, value in page.attributes if name.split(":")[-1] in ("href", "src", "action", "data")]
        assert {link for link in links if not link.startswith("#")} == {"data:,"}
        assert not [value for _, value in page.attributes if "http" in value]
    assert page.text.count(NASTY) >= 10  # the second: as text, wherever it stands


def test_ids_are_unique_and_what_they_are_used_for_is_there(report: VerifyReport) -> None:
    page = Elements(html(report))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    used = {value[1:] for name, value in page.attributes if name.endswith("href") and value.startswith("#")}
    used |= {match for _, value in page.attributes for match in re.findall(r"url\(#([^)]+)\)", value)}
    assert used
    assert used <= set(ids)


def test_colours_are_those_of_the_page(report: VerifyReport) -> None:
    drawn = [kl_by_token(outputs(report)), error_by_depth(outputs(report))]
    assert report.weights.rounding is not None
    drawn.append(rounding_errors(report.weights.rounding))
    for svg in drawn:
        assert svg is not None
        assert "var(--ink)" in svg
        assert not re.findall(r"#[0-9a-f]{6}\b(?!\")", svg)


def test_nothing_to_draw(report: VerifyReport) -> None:
    """No error at all (a float64 checkpoint), none that is a number, and no hidden states."""
    found = outputs(report)
    assert found.source is not None
    for kl, depth in ((0.0, (0.0, 0.0)), (float("nan"), (float("nan"),) * 2), (float("inf"), (0.5,))):
        run = replace(found.source, kl=kl, kl_by_token=(kl,) * 5, depth=depth)
        empty = replace(found, source=run, converted=run, rounding=run)
        assert kl_by_token(empty) is None
        assert error_by_depth(empty) is None
        assert Elements(html(replace(report, outputs=empty))).text
    rounding = report.weights.rounding
    assert rounding is not None
    assert rounding_errors(replace(rounding, histogram=(0,) * 40)) is None


def test_other_answers_have_a_page(folders: tuple[Path, Path], report: VerifyReport) -> None:
    wrong = replace(report, weights=replace(report.weights, problems=120, findings=(Finding("file", "a", "is b"),)))
    text = Elements(html(wrong)).text
    assert "is NOT the same model as" in text
    assert "file a: is b" in text
    assert "and 119 more" in text
    skipped = Elements(html(replace(report, outputs=OutputsReport(skipped="it does not fit")))).text
    assert "Outputs were not compared: it does not fit." in skipped
    assert "not asked for" in Elements(html(verify(*folders, weights_only=True))).text
    text = " ".join(Elements(html(other(report))).text.split())
    assert f"forward: {NASTY}" in text
    assert "does not repeat there: forward: mask" in text
    alone = verify(folders[1], weights_only=True)
    text = Elements(html(alone)).text
    assert "is whole, and what its flashnorm.json and its model's code say" in text
    assert "Whether the folded weights are the products" in text


def test_a_page_that_cannot_be_written(report: VerifyReport, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "report.html", Path("/dev/null")):
        with pytest.raises(InputError, match="expected a file in a folder that can be written to"):
            check_page(path)
    write_page(report, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    long = tmp_path / ("x" * 250 + ".html")
    with pytest.raises(InputError, match="cannot be written"):
        write_page(report, long)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium to open the page in (Debian's package: chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *quiet])
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda report: report, nasty], ids=["as it is", "nasty"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 360), ("light", 360)])
def test_in_a_browser(
    report: VerifyReport,
    browser: Any,
    tmp_path: Path,
    scheme: str,
    width: int,
    make: Callable[[VerifyReport], VerifyReport],
) -> None:
    """On a phone and on a screen, light and dark: all is there, nothing sticks out, nothing is asked for."""
    write_page(make(report), tmp_path / "report.html")
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append("a dialog"))
    page.goto((tmp_path / "report.html").as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Letters against the paper, of the page and of its plots.
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{style}") for style in ("backgroundColor", "color"))
    assert contrast(paper, ink) > 7
    colours = page.evaluate("[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)")
    assert len(colours) > 20
    assert min(contrast(paper, colour) for colour in colours) > 7
    assert (luminance(paper) > 0.5) == (scheme == "light")
    figures = page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(figures) == 3
    assert min(figures) > 150
    picture = page.screenshot(full_page=True)
    assert len(picture) > 50_000
    context.close()


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2)."""
    values = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2); 7 is its highest grade for text."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
