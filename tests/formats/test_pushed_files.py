"""What a push sends: the files that the format knows, through no link, and without credentials."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modmoe.cli import main
from modmoe.errors import ExportError
from modmoe.exports import hub
from modmoe.formats.credentials import find_credential
from modmoe.formats.pushed_files import contents
from tests.support import tiny

# put together here, so that no one who looks for credentials finds this file
SECRETS = {
    "a token of the Hugging Face Hub": "hf_" + "aB3" * 11,
    "an API key": "sk-" + "proj-" + "a1B2c3D4" * 4,
    "a key of AWS": "AKIA" + "ABCDEFGH23456789",
    "a token of GitHub": "ghp_" + "a1B2" * 9,
    "a token of GitLab": "glpat-" + "a1B2c3D4e5" * 2,
    "a token of Slack": "xoxb-" + "123456789012-abcdef",
    "a key of Google": "AIza" + "a1B2c3D" * 5,
    "a token of PyPI": "pypi-" + "AgEIcHlwaS5vcmc" * 3,
    "a private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "a web token": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0" + ".c2lnbmF0dXJlMTIz",
    "a password in an address": "https://me:" + "s3cret@example.org/x",
    "a password": "machine example.org login me " + "password s3cret",
    "a secret value": "api_key: " + "a1b2c3d4e5f6",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = Path(tiny.save_dense(tmp_path / "model"))
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    return directory


@pytest.mark.parametrize("kind", SECRETS)
def test_a_credential_in_what_would_be_sent_stops_the_push(
    model: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = SECRETS[kind]
    with (model / "README.md").open("a") as card:
        card.write(f"\nsee {secret}\n")
    assert main.run(["push", str(model), "me/moe", "--dry-run", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"README.md:7: holds what looks like {kind}" in err and "remove it" in err
    assert secret not in err


def put_in_config(model: Path, secret: str) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init": {"token": secret}}, indent=1))


def put_in_metadata(model: Path, secret: str) -> None:
    save_file({"a": torch.zeros(1)}, model / "adapter_model.safetensors", metadata={"run": secret})


def put_in_recipe(model: Path, secret: str) -> None:
    (model / "modmoe.yaml").write_text(f"# run: {secret}\nseed: 1\n")


def put_in_template(model: Path, secret: str) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text(f"{{# {secret} #}}")


@pytest.mark.parametrize("put", [put_in_config, put_in_metadata, put_in_recipe, put_in_template])
def test_wherever_it_stands(model: Path, put: Callable[[Path, str], None]) -> None:
    secret = SECRETS["a token of the Hugging Face Hub"]
    put(model, secret)
    with pytest.raises(ExportError, match="looks like a token of the Hugging Face Hub") as caught:
        hub.push(str(model), "me/moe", dry_run=True)
    assert secret not in str(caught.value)


def test_the_users_own_token_is_found_whatever_it_looks_like(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-words")
    (model / "LICENSE").write_text("free\nplain-words")
    with pytest.raises(ExportError, match=r"LICENSE:2: holds what looks like your token"):
        hub.push(str(model), "me/moe", dry_run=True)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 64,
        "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "password: see the manual",
        "api_key=os.environ['OPENAI_API_KEY']",
        "export HF_TOKEN=hf_...",
        "token = tokenizer.pad_token",
        "https://user:password@example.org and https://huggingface.co/me/model@main",
        "scikit-learn, sk-learn and task-specific-words-that-are-long",
        "secret: ${{ secrets.KEY }}",
    ],
)
def test_what_is_no_credential_stops_nothing(text: str) -> None:
    assert find_credential(text) is None


@pytest.mark.parametrize("piece", ["sk-", "password=", "eyJ-", "://a", "machine a ", "A "])
def test_a_long_line_is_looked_through_in_one_go(piece: str) -> None:
    """A pattern that looks ahead to the end of the line from each piece would take minutes."""
    line = piece * (200_000 // len(piece))
    assert find_credential(line) is None
    assert find_credential(f"{line} {SECRETS['a key of AWS']}") == (1, "a key of AWS")


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt"])
def test_a_text_too_large_to_look_through_is_refused(model: Path, name: str) -> None:
    with (model / name).open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ExportError, match=rf"{name}: has 314,572,800 bytes, over 16,777,216 .* take it away"):
        hub.push(str(model), "me/moe", dry_run=True)


def test_a_vocabulary_may_hold_any_string(model: Path) -> None:
    path = model / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["comment"] = SECRETS["a key of AWS"]
    path.write_text(json.dumps(vocabulary))
    assert "tokenizer.json" in contents(model)


@pytest.mark.parametrize(
    "name",
    [
        "service-account.json", "token.txt", "secrets.yaml", "id_rsa", ".env", ".netrc", "train.py", "notes.md",
        "config.json.bak", "Config.JSON", "model.safetensors.tmp", "optimizer.pt", "data.jsonl", "config\u2024json",
        "wandb.json", ".modmoe.json", "LICENSE key.pem",
    ],
)  # fmt: skip
def test_what_the_format_does_not_know_is_not_sent(model: Path, name: str) -> None:
    (model / name).write_text("x")
    result = hub.push(str(model), "me/moe", dry_run=True)
    assert name not in [file["path"] for file in result["files"]]
    assert [item["path"] for item in result["left_out"]] == ([] if name == ".modmoe.json" else [name])


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "tokenizer_config.json"])
def test_nothing_is_sent_through_a_link(model: Path, name: str) -> None:
    (model / "elsewhere").write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("elsewhere")
    with pytest.raises(ExportError, match=r"is a link; put the file itself there"):
        hub.push(str(model), "me/moe", dry_run=True)
    (model / name).unlink()
    (model / "extra.json").symlink_to("elsewhere")
    left = hub.push(str(model), "me/moe", dry_run=True)["left_out"]
    assert {"path": "extra.json", "why": "a link"} in left


def test_what_was_looked_at_is_what_is_sent(model: Path) -> None:
    parcel = contents(model, "me/moe")
    (model / "config.json").write_text(SECRETS["an API key"])
    assert isinstance(parcel["config.json"], bytes) and b"sk-" not in parcel["config.json"]
