"""One place knows what is secret (HOUSE section 4, row 10): taken out of logs, named on pages, kept from strangers' processes."""

import html
import re
from pathlib import Path
from urllib.parse import quote

import pytest

import make_us_rich
from make_us_rich.core.secrets import canaries, environment_for, find_secrets, is_secret, scrub, secret_values, shown
from make_us_rich.core.settings import Settings, SettingsError, get_settings
from make_us_rich.core.storage import Objects

LIBRARY = Path(make_us_rich.__file__).parent
TOKEN = "mur_" + "a1B2" * 10
TEXTS = {
    f"asked with {TOKEN} at noon": TOKEN,
    "at postgresql://mur:pa55word@db:5432/mur": "pa55word",
    "from https://s3.eu/a?X-Amz-Signature=0a1b2c3d": "0a1b2c3d",
    "-----BEGIN PRIVATE KEY-----\nMIIabc\n-----END PRIVATE KEY-----": "MIIabc",
    "Authorization: Bearer abcdefgh": "abcdefgh",
    "{'password': 'hunter2hunter2'}": "hunter2hunter2",
}


@pytest.mark.parametrize("text", TEXTS)
def test_scrub_takes_every_form_out_once_and_for_all(text):
    told = scrub(text)
    assert TEXTS[text] not in told and "***" in told and scrub(told) == told


def test_a_page_is_searched_as_text_html_and_url():
    secret = "it's <mine> & 0nly"
    values = secret_values({"WANDB_API_KEY": secret, "HOME": "/somewhere/long"})
    for writing in (secret, html.escape(secret), quote(secret)):
        assert find_secrets(f"x {writing} y", values) == ["WANDB_API_KEY"]
    assert find_secrets("nothing of it", values) == [] and canaries("nothing of it") == []


def test_every_setting_that_hides_itself_is_known_as_secret():
    hidden = [f"MUR_{name.upper()}" for name, field in Settings.model_fields.items() if not field.repr]
    assert hidden and all(is_secret(name) for name in hidden)
    known = dict.fromkeys([*hidden, "AWS_SECRET_ACCESS_KEY", "GH_TOKEN", "PYTHON_TOKEN", "MKRICH_TOKEN", "PATH"], "x")
    assert environment_for("network", env=known) == {"PATH": "x"}


def test_sentences_about_addresses_hide_what_is_in_them():
    assert shown("s3://key:secret@bucket/models?sig=1") == "s3://bucket/models" and shown("mur:secret@db") == "***"
    assert "secret" not in Objects("s3://key:secret@bucket/models", "store of models", "MUR_MODELS_URL").url
    with pytest.raises(SettingsError) as told:
        get_settings(database_url="mysql://mur:secret@db/mur")
    assert "secret" not in str(told.value) and "MUR_DATABASE_URL is wrong: " in str(told.value)


ADDRESSES = (
    "s3://KEY:SEC/RET@bucket/models",
    "s3://KEY:SEC?RET@bucket",
    "s3://KEY:SEC#RET@bucket",
    "s3://KEY:SEC@RET@bucket",
    "https://host/models?sig=SECRET",
    "https://host/models?to=me@home&sig=SECRET",
    "https://SECRET@host/x",
    "https://host:80#SECRET",
    "SECRET",
    "//SECRET@host",
    "SEC RET://host",
)


@pytest.mark.parametrize("url", ADDRESSES)
def test_nothing_of_a_password_is_shown(url):
    told = shown(url)
    assert not re.search("KEY|SEC|RET|sig", told) and shown(told) == told


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_a_wrong_setting_is_named_and_not_repeated(name, monkeypatch):
    "Whatever it is: nobody knows what was pasted there."
    canary = "canary-\N{BIRD}-not:to@be/seen"
    monkeypatch.setenv(f"MUR_{name.upper()}", canary)
    if name in ("home", "runs", "host", "hosts", "alert_urls", "wandb_project", "signing_key"):
        get_settings()  # any text will do
        return
    with pytest.raises(SettingsError, match=f"MUR_{name.upper()} is wrong: ") as told:
        get_settings()
    assert "canary" not in str(told.value)


def test_no_other_room_knows_a_form_of_secrets():
    form = re.compile(r"re\.(?:compile|sub|search)\([^\n]*(?:password|secret|bearer|BEGIN)", re.I)
    rooms = [p for p in LIBRARY.rglob("*.py") if p.parent.name != "core"]
    found = [str(p.relative_to(LIBRARY)) for p in rooms if form.search(p.read_text())]
    assert found == ["api/limits.py"]  # which refuses a token in an address before anybody reads it
