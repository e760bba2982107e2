"""The page in a real browser: streamed answers, Stop, probabilities, and nothing that leaves it."""

from __future__ import annotations

import json

import pytest

from tests.ranks.serving import make_run, serving
from tools.browser import NoBrowser, browser

TOKEN = "t" * 40
HOSTILE = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'
EVENTS = 'data: {"a": "\U0001f600"}\n\n: note\n\ndata: [DONE]\n\n'
ENTER, ESCAPE, RIGHT = "\ue007", "\ue00c", "\ue014"
TURNS = "document.querySelectorAll('#talk > li').length"
DONE = f"return !document.querySelector('.growing') && {TURNS}"
SAID = "return document.querySelector('#talk > li:last-child .said').textContent"
TOGGLE = "document.querySelector('[name=probabilities]').click()"


@pytest.fixture(scope="module")
def client(tmp_path_factory, run_ranks, ranks):
    run = make_run(tmp_path_factory.mktemp("page") / "tiny", run_ranks)
    with serving(run, ranks, token=TOKEN, slots=2, pace=0.02) as client:
        yield client


@pytest.fixture(scope="module")
def window(client):
    try:
        with browser() as window:
            yield window
    except NoBrowser as missing:
        pytest.skip(str(missing))


@pytest.fixture
def page(window, client):
    """The page, newly opened, with the token given, on a desktop."""
    window.resize(1100, 800)
    window.open(f"http://127.0.0.1:{client.port}/")
    window.until("return document.getElementById('token-dialog').open")
    window.type("#token", TOKEN + ENTER)
    window.until("return document.getElementById('model').textContent === 'tiny'")
    window.log("browser"), window.log("performance")
    window.js("settings.seed.value = 5; settings.max_tokens.value = 12")
    return window


def ask(page, text):
    page.type("#draft", text + ENTER)
    page.until(DONE)


def answer(client, messages, **how):
    asked = {"messages": messages, "seed": 5, "max_tokens": 12, "temperature": 0.7, **how}
    _, found, _ = client.send(
        "POST", "/v1/chat/completions", asked, Authorization=f"Bearer {TOKEN}"
    )
    return found["choices"][0]["message"]["content"]


def test_answer_is_streamed_and_is_the_servers(page, client):
    page.type("#draft", "hello" + ENTER)
    page.until("return document.querySelector('.growing .said')?.textContent.length > 0")
    page.until(DONE)
    want = answer(client, [{"role": "user", "content": "hello"}])
    assert page.js(SAID) == want
    assert page.js("return document.getElementById('spoken').textContent") == want
    used = page.js("return document.getElementById('count').textContent")
    assert used.endswith("/ 96") and int(used.split()[0]) > 12


def test_stop_ends_the_answer_at_the_server_too(page, client):
    page.js("settings.max_tokens.value = 60")
    page.type("#draft", "hello" + ENTER)
    page.until("return document.querySelector('.growing .said')?.textContent.length > 0")
    page.click("#stop")
    page.until(DONE)
    assert "(stopped)" in page.js("return document.querySelector('#talk').textContent")
    for _ in range(200):
        _, text, _ = client.send("GET", "/metrics", Authorization=f"Bearer {TOKEN}")
        if "megalite_open_requests 0" in text:
            break
    assert "megalite_open_requests 0" in text
    # The keyboard does the same.
    page.type("#draft", "again" + ENTER)
    page.until("return document.querySelector('.growing')")
    page.keys(ESCAPE)
    page.until(DONE)


def test_regenerate_and_edit_go_on_from_there(page, client):
    ask(page, "one")
    ask(page, "two")
    assert page.js(DONE) == 4
    page.js("settings.seed.value = 6")
    page.js("document.querySelectorAll('.assistant .acts button')[0].click()")
    page.until("return document.querySelectorAll('#talk > li').length === 2")
    page.until(DONE)
    assert page.js(SAID) == answer(client, [{"role": "user", "content": "one"}], seed=6)
    page.js("document.querySelector('.user .acts button').click()")
    assert page.js("return document.getElementById('draft').value") == "one"
    page.type("#draft", " more")
    page.keys(ENTER)
    page.until("return document.querySelector('.user .said').textContent === 'one more'")
    page.until(DONE)
    assert page.js(SAID) == answer(client, [{"role": "user", "content": "one more"}], seed=6)


def test_system_prompt_and_settings_are_sent(page, client):
    page.type("[name=system]", "be kind")
    page.js("settings.temperature.value = 0; settings.repetition_penalty.value = 1.2")
    ask(page, "hello")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert page.js(SAID) == answer(client, messages, temperature=0, repetition_penalty=1.2)
    page.click("#curl-open")
    curl = page.js("return document.getElementById('curl').value")
    body = json.loads(curl[curl.index("-d '") + 4 : -1].replace("'\\''", "'"))
    assert body["messages"] == messages and body["repetition_penalty"] == 1.2
    assert "$TOKEN" in curl and TOKEN not in curl


def test_tokens_tell_what_else_was_thought_of(page):
    page.js(TOGGLE)
    ask(page, "hello")
    tokens = "document.querySelectorAll('.assistant .t')"
    assert page.js(f"return {tokens}.length") == 12
    assert page.js(f"return [...{tokens}].map(t => t.textContent).join('')") == page.js(SAID)
    page.hover(".assistant .t:nth-child(2)")
    page.until("return !document.getElementById('tip').hidden")
    assert page.js("return document.querySelectorAll('#tip .row').length") == 5
    assert "entropy" in page.js("return document.getElementById('tip').textContent")
    page.keys(ESCAPE)
    assert page.js("return document.getElementById('tip').hidden")
    page.js(f"{tokens}[0].focus()")
    page.keys(RIGHT)
    assert page.js(f"return document.activeElement === {tokens}[1]")
    assert page.js("return !document.getElementById('tip').hidden")


def test_text_goes_on_and_branches(page):
    page.js("document.querySelector('[value=text]').click();" + TOGGLE)
    ask(page, "def f(")
    first = page.js(SAID)
    assert first.startswith("def f(") and page.js(DONE) == 1
    tokens = "[...document.querySelectorAll('.text .t')]"
    before = page.js(f"return {tokens}.map(t => t.textContent)")
    page.click(".text .t:nth-child(3)")
    rival = page.js("return document.querySelector('#tip button code').textContent")
    page.click("#tip button")
    page.until(DONE)
    after = page.js(f"return {tokens}.map(t => t.textContent)")
    assert after[:2] == before[:2] and len(after) == 3 + 12
    assert len(rival) > 0 and page.js(SAID).startswith("def f(" + "".join(before[:2]))


def test_hostile_text_is_text(page):
    ask(page, HOSTILE)
    assert HOSTILE in page.js("return document.querySelector('.user .said').textContent")
    made = page.later(
        "const t = await import('/page/tokens.js');"
        f"const text = {json.dumps(HOSTILE)};"
        "const bytes = [...new TextEncoder().encode(text)];"
        "const token = {token: text, bytes, logprob: -1};"
        "token.top_logprobs = [{token: text, logprob: -1}];"
        "const box = document.querySelector('#talk');"
        "box.append(t.plain(text + '\\n```\\n' + text + '\\n```\\n'), t.coloured([token], null));"
        "box.querySelector('.t').focus();"
        "return document.getElementById('tip').textContent.includes('onerror');"
    )
    assert made is True
    assert (
        page.js("return document.querySelectorAll('main img, main script, #tip img').length") == 0
    )
    assert page.js("return document.querySelectorAll('#talk pre').length") == 1
    assert page.js("return window.broken") is None


def test_tokenizer_shows_its_cuts(page):
    page.type("#draft", "def hello")
    page.click("#tokenizer-open")
    page.until("return document.querySelectorAll('#cut span').length > 0")
    found = page.js(
        "return [...document.querySelectorAll('#cut span')].map(s => s.firstChild.data)"
    )
    assert "".join(found) == "def hello"


def test_nothing_leaves_the_origin_and_nothing_breaks_the_policy(page, client):
    page.js(TOGGLE)
    ask(page, "hello")
    page.click("#theme")
    events = [json.loads(row["message"])["message"] for row in page.log("performance")]
    asked = [e["params"]["request"]["url"] for e in events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked and all(u.startswith(f"http://127.0.0.1:{client.port}/") for u in asked), asked
    assert [row for row in page.log("browser") if row["level"] != "INFO"] == []
    stored = "return [document.cookie, localStorage.length, sessionStorage.length]"
    assert page.js(stored) == ["", 0, 0]


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_page_fits_every_width(page, width):
    page.resize(width, 740)
    ask(page, "w" * 300)
    assert page.js("return document.documentElement.scrollWidth <= window.innerWidth")
    if width < 896:
        page.click("#panel-open")
        page.until(
            "return document.getElementById('panel').getBoundingClientRect().right <= innerWidth"
        )
        assert page.js("return document.getElementById('panel-open').ariaExpanded") == "true"
    labels = "return [...document.querySelectorAll('input, textarea, button')].filter(e => "
    labels += "!(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"
    assert page.js(labels) == []


def test_events_are_read_wherever_they_are_cut(page):
    found = page.later(
        "const { Events } = await import('/page/api.js');"
        f"const bytes = new TextEncoder().encode({json.dumps(EVENTS)});"
        "const seen = new Set();"
        "for (let size = 1; size <= bytes.length; size++) {"
        "  const events = new Events(), decoder = new TextDecoder(), got = [];"
        "  for (let at = 0; at < bytes.length; at += size)"
        "    got.push(...events.add(decoder.decode(bytes.slice(at, at + size), {stream: true})));"
        "  seen.add(JSON.stringify(got));"
        "}"
        "return [...seen];"
    )
    assert [json.loads(one) for one in found] == [['{"a": "\U0001f600"}', "[DONE]"]]


def test_wrong_token_is_asked_for_again_and_errors_can_be_retried(window, client):
    window.open(f"http://127.0.0.1:{client.port}/")
    window.until("return document.getElementById('token-dialog').open")
    window.type("#token", "wrong" + ENTER)
    window.until("return document.getElementById('token-dialog').open")
    window.type("#token", TOKEN + ENTER)
    window.until("return document.getElementById('model').textContent === 'tiny'")
    window.js("settings.temperature.value = -1")
    window.type("#draft", "hello" + ENTER)
    alert = "document.querySelector('[role=alert]')"
    window.until(f"return {alert}?.textContent.startsWith('temperature: ')")
    window.js("settings.seed.value = 5; settings.max_tokens.value = 9999")
    window.js("settings.temperature.value = 1")
    acts = "[...document.querySelectorAll('.acts button')]"
    window.js(f"{acts}.find(b => b.textContent === 'Try again').click()")
    window.until(f"return !{alert}")
    window.until(DONE)  # with what room there is, which is less than asked for
    assert "cut off at its limit" in window.js("return document.getElementById('talk').textContent")
