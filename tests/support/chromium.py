"""Pages in headless Chromium, as files, in a window of a given width."""

from __future__ import annotations

import html
import re
import shutil
import subprocess

import pytest

KEYBOARD = """
for (const e of document.querySelectorAll('details')) e.open = true;
const reached = [...document.querySelectorAll('a[href], summary, input[type="radio"], [tabindex="0"]')];
const scrolling = [...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1
  && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX));
told += reached.length > 7 ? '' : 'too few; ';
for (const e of scrolling) if (!reached.includes(e)) told += 'cannot be scrolled by keys: ' + e.className + '; ';
if (document.querySelector('button, input:not([type="radio"]), [onclick], [tabindex]:not([tabindex="0"]):not([tabindex="-1"])'))
  told += 'unexpected control; ';
const skip = reached[0];
if (skip.className !== 'skip' || skip.getBoundingClientRect().left >= 0) told += 'no hidden skip link first; ';
for (const e of reached) {
  e.focus();
  const style = getComputedStyle(e);
  if (document.activeElement !== e) told += 'not focused: ' + e.outerHTML.slice(0, 60) + '; ';
  else if (style.outlineStyle === 'none' || parseFloat(style.outlineWidth) < 2)
    told += 'focus is not seen: ' + e.outerHTML.slice(0, 60) + '; ';
}
skip.focus();
if (skip.getBoundingClientRect().left < 0) told += 'skip link stays hidden; ';
skip.click();
if (location.hash !== '#main' || document.getElementById('main').tabIndex !== -1) told += 'skip link leads nowhere; ';
for (const e of document.querySelectorAll('details')) {
  const before = e.open; e.querySelector('summary').click(); if (e.open === before) told += 'does not open; ';
}
const seen = side => [...document.querySelectorAll('.one.' + side)].filter(e => getComputedStyle(e).display !== 'none');
for (const e of document.querySelectorAll('input[type="radio"]')) {
  const [side, number] = e.id.split('-');
  e.click();
  const now = seen(side);
  if (now.length !== 1 || !now[0].classList.contains('one-' + number)) told += 'does not choose: ' + e.id + '; ';
  for (const image of now[0] ? now[0].querySelectorAll('img') : [])
    if (!image.naturalWidth || image.getBoundingClientRect().width < 40) told += 'not seen: ' + image.alt + '; ';
}
told += 'all ' + document.querySelectorAll('details').length + ' open and close';
"""


# A machine without Chromium must not pass for one where the pages were looked at: the reason stands in the summary.
with_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="headless Chromium is not installed")


def in_chromium(page, width, script, folder):
    """The text that `script` puts into the variable `told` when the page stands in a window of that width, as a file.

    A window of Chromium is never narrower than about 500 pixels, a frame is.
    """
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    script = f"<script>let told = ''; {script}; parent.document.title = 'told ' + told</script></body>"
    (folder / "page.html").write_text(page.replace("</body>", script))
    frame = f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    (folder / "frame.html").write_text(f"<!DOCTYPE html><title>not loaded</title>{frame}")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += " --disable-component-update --allow-file-access-from-files --window-size=1400,1000"
    found = subprocess.run(
        [shutil.which("chromium"), *flags.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        + [(folder / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", found.stdout, flags=re.DOTALL)[1]
    assert title.startswith("told "), title
    return html.unescape(title.removeprefix("told "))
