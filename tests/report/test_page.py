"""One file, nothing from outside, and nothing that a caller passes becomes markup."""

import re

import pytest
import torch
from markupsafe import Markup

from sfumato.claim import Verdict
from sfumato.errors import BadData
from sfumato.report import Page, bars, curves
from sfumato.report.page import prose

EVIL = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>"


def full(text: str = "plain") -> Page:
    image, other = torch.rand(3, 12, 16), torch.rand(3, 12, 16)
    page = Page(text, subtitle=text, facts={text: text, "seed": 1234})
    for i in range(4):
        page.section(f"{text} {i}", intro=text)
    page.text(text).table([{text: text, "n": 1.5}], caption=text, highlight={"n": "max"}).table([[text]], [text], folded=text)
    page.figure(curves({text: ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, xlabel=text, ylabel=text), text)
    page.figure([bars({text: 1.0}, xlabel=text), bars({"b": 2.0})])
    page.pictures({text: image, "b": other}, text).pictures({text: image}, zoom=False)
    page.slider(image, other, (text, text), text).slider(
        image, {text: other, "c": other}, (text, ""), reference=image, reference_label=text
    )
    page.code(text, text).verdict(text, text, interval=(1.0, 0.5, 1.5), margin=0.2, note=text)
    return page


def test_everything_is_escaped():
    html = full(EVIL).html()
    assert "<img src=x" not in html
    assert html.count("<script") == 1
    assert "onerror=alert(1)>" not in html.replace("onerror=alert(1)&gt;", "")


def test_the_markup_is_the_same_whatever_the_words():
    def tags(html: str) -> list[str]:
        body = re.sub(r"<svg.*?</svg>", "<svg>", html[html.index("</head>") :], flags=re.S)
        return re.findall(r"</?[a-zA-Z][a-z0-9]*", body)

    assert tags(full(EVIL).html()) == tags(full("plain").html())


def test_the_page_asks_nothing_of_the_network():
    html = full().text("[a link](https://example.org/x) and http://example.org").html()
    outside = re.findall(r"""(?:src|href|srcset|poster|data|action)\s*=\s*["']([^"']*)""", html)
    assert {o for o in outside if not o.startswith(("data:", "#"))} == {"https://example.org/x"}
    assert all(u.startswith("#") for u in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_the_policy_lets_only_our_script_run():
    import base64
    import hashlib

    html = full().html()
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert not re.search(r"<[^>]+\son\w+=", html[html.index("<body") :])


def test_ids_are_unique_and_labels_point_somewhere():
    html = full().html()
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for named in re.findall(r'aria-(?:labelledby|controls)="([^"]+)"', html):
        assert named in ids
    body = html[html.index("<main") : html.index("<dialog")]
    assert all("alt=" in tag and ("width=" in tag or "draggable" in tag) for tag in re.findall(r"<img[^>]*>", body))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a *b* **c** `*d* <e>`", "<p>a <em>b</em> <strong>c</strong> <code>*d* &lt;e&gt;</code></p>"),
        ("one\n\ntwo", "<p>one</p><p>two</p>"),
        ("- x\n- y", "<ul><li>x</li><li>y</li></ul>"),
        ("2 * 3 * 4 and a_b_c", "<p>2 * 3 * 4 and a_b_c</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ("[x](https://a.b/c)", '<p><a href="https://a.b/c" rel="noopener noreferrer">x</a></p>'),
    ],
)
def test_prose(text, html):
    assert prose(text) == html


def test_a_link_cannot_leave_its_attribute():
    html = str(prose('[x](https://a.b/"onmouseover="alert(1))'))
    assert '"onmouseover' not in html
    assert prose(Markup("<b>kept</b>")) == "<b>kept</b>"


def test_tables_share_decimals_and_mark_the_best():
    rows = [{"arm": "a", "psnr": 31.18, "seconds": 252}, {"arm": "b", "psnr": 28.2, "seconds": 2}, {"arm": "c", "psnr": None}]
    html = Page("t").table(rows, ["arm", "psnr", "seconds"], highlight={"psnr": "max", "seconds": "min"}).html()
    cells = re.findall(r'<td class="([^"]*)">([^<]*)', html)
    assert [c for c in cells if c[0].startswith("number")] == [
        ("number best", "31.18"), ("number", "252"), ("number", "28.20"), ("number best", "2"), ("number", "–"), ("number", "–"),
    ]  # fmt: skip
    ragged = Page("t").table([[1], [1, 2, 3]], ["a"]).html()
    assert ">3<" in ragged


def test_large_and_small_numbers_in_one_column():
    html = Page("t").table([{"v": 1e-5}, {"v": 12345.6}, {"v": float("nan")}]).html()
    assert all(f">{text}<" in html for text in ("1e-5", "12,346", "–"))


def test_verdicts():
    html = Page("t").verdict(Verdict.NOT_REPRODUCED, "s", interval=(0.2, -0.3, 0.7), margin=1.0).html()
    assert 'class="verdict bad"' in html
    assert "mean difference +0.20, 95 % interval −0.30 to +0.70, margin 1" in html


def test_small_pictures_keep_their_pixels_and_sizes_are_known():
    html = Page("t").pictures({"small": torch.rand(3, 8, 8), "large": torch.rand(3, 8, 300)}).html()
    small, large = re.findall(r"<img[^>]*>", html)
    assert "pixels" in small
    assert "pixels" not in large
    assert 'width="300" height="8"' in large


def test_empty_blocks():
    html = Page("t").pictures({}).figure([]).table([]).text("").html()
    assert "<figure" not in html
    with pytest.raises(BadData, match="slider"):
        Page("t").slider(torch.rand(3, 4, 4), {})


def test_write_is_whole_or_nothing(tmp_path):
    path = Page("t").write(tmp_path / "new" / "page.html")
    before = path.read_text(encoding="utf-8")
    broken = Page("t")
    broken.sections.append({"title": "no such keys"})
    with pytest.raises(Exception, match="no attribute"):
        broken.write(path)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
