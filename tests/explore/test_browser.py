"""The page in Chromium, if Chromium is installed."""

import struct
from pathlib import Path

import pytest

from lesson.explore.browser import Browser, can_browse
from lesson.explore.picture import SIZE, draw
from lora.save import save_adapter
from storage.hub import MINI
from tests.explore.client import serving
from tests.pairs import adapted


@pytest.fixture(scope="module")
def mini_adapter(tmp_path_factory) -> Path:
    """A random adapter of mini, strong enough to change the text."""
    directory = tmp_path_factory.mktemp("explore") / "mini"
    save_adapter(adapted(MINI, ("c_attn",), r=2, lora_alpha=1), directory, "mini")
    return directory


@pytest.mark.skipif(not can_browse(), reason="needs chromium and chromedriver")
def test_in_a_browser(mini_adapter, tmp_path):
    with serving("mini", mini_adapter) as client, Browser() as browser:
        address = f"http://127.0.0.1:{client.port}"
        draw(browser, address, tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes()[:24].endswith(struct.pack(">II", *SIZE))
        assert browser.run("return document.querySelectorAll('#likeliest li').length") == 10
        hidden = "return document.getElementById('likeliest').hidden"
        assert browser.run(hidden) is False
        browser.type("#strength", "\ue00c")  # Escape, with the mouse on the token
        assert browser.run(hidden) is True
        assert browser.run("return document.getElementById('strength').offsetHeight") >= 24
        coloured = "return document.querySelectorAll('#tokens .gain, #tokens .loss').length"
        assert browser.run(coloured) > 20
        written = "document.getElementById('write-status').textContent.startsWith('Both')"

        def text_of(element: str) -> str:
            return browser.run("return document.querySelector(arguments[0]).textContent", element)

        by_base, by_adapter = text_of("#by-base"), text_of("#by-adapter")
        assert by_base != by_adapter
        browser.type("#prompt", " and <b>")
        browser.wait("document.querySelector('#by-base .given')?.textContent.endsWith(' and <b>')")
        browser.wait(written)
        assert text_of("#by-base") != by_base != ""

        gain = text_of("#summary b")
        browser.type("#strength", "\ue011")  # Home sets the strength to 0
        browser.wait("document.querySelector('#summary b').textContent === '+0.00'")
        browser.wait(written)
        assert gain != "+0.00" and text_of("#by-base") == text_of("#by-adapter")
        assert text_of("#strength-is") == "0.00" and "nothing is left" in text_of("#kept")
        browser.run("document.getElementById('reset').click()")
        browser.wait(f"document.querySelector('#summary b').textContent === '{gain}'")

        browser.run("document.querySelector('#tokens span').focus()")
        assert "nothing comes before it" in text_of("#likeliest")
        browser.type("#tokens span", "\ue014")  # right arrow
        assert "was expected with" in text_of("#likeliest")
        assert browser.run(
            "return document.activeElement.previousElementSibling === "
            "document.querySelector('#tokens').firstChild"
        )
        colours = browser.run(
            "return ['gain', 'loss'].map((kind) => getComputedStyle(document.querySelector("
            "`#tokens .${kind}`)).textDecorationStyle)"
        )
        assert colours == ["solid", "dotted"]

        browser.type("#colour", "f")  # forgetting
        browser.wait("document.querySelectorAll('#tokens .gain').length === 0")
        assert browser.run(coloured) > 20
        assert "what the base expected" in text_of("#key-loss")

        paper = "return getComputedStyle(document.documentElement).backgroundColor"
        browser.prefer("light")
        light = browser.run(paper)
        browser.prefer("dark")
        assert browser.run(paper) != light
        browser.resize(320, 640)
        assert browser.run("return document.documentElement.scrollWidth") == 320

        browser.type("#temperature", "-")
        browser.wait("document.getElementById('write-error').textContent.includes('temperature')")
        assert text_of("#by-base") == text_of("#by-adapter") == "" != text_of("#summary")
        asked = browser.run("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert len(asked) > 5 and all(url.startswith(f"{address}/api/") for url in asked)
        blocked = """
            const blocked = new Promise((done) => {
              document.addEventListener("securitypolicyviolation", (e) => done(e.blockedURI));
            });
            fetch("http://localhost:9/").catch(() => {});
            return blocked;
        """
        assert browser.run(blocked).startswith("http://localhost:9")
