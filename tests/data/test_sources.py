import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from grade_lightning.data import BundledReviews, BundledSums, HubDataset, LocalFiles, sources
from grade_lightning.errors import InputError

TEXTS = ["Great film.<br /><br />See it.", "Dull, slow."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        data = datasets.Dataset.from_list(rows)
        getattr(data, f"to_{path.suffix[1:]}")(path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl", ".txt", ".CSV"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "label": label, "stars": 3} for text, label in zip(TEXTS, (1, 0), strict=True)]
    path = write(tmp_path / "mine" / f"reviews{suffix.lower()}", rows)
    path = path.rename(path.with_suffix(suffix))
    data = LocalFiles(str(path)).load()
    assert list(data) == ["train"]
    assert data["train"]["text"][:] == ["Great film.\n\nSee it.", "Dull, slow."]
    if suffix != ".txt":
        assert data["train"]["label"][:] == [1, 0]
        assert data["train"]["stars"][:] == [3, 3]
    assert list(path.parent.iterdir()) == [path]


def test_folder_with_train_and_test_files(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        write(tmp_path / f"train-{i}.jsonl", [{"text": text}])
    write(tmp_path / "test.jsonl", [{"text": "Fine."}])
    data = LocalFiles(str(tmp_path)).load()
    assert len(data["train"]) == 2
    assert data["test"]["text"][:] == ["Fine."]
    other = write(tmp_path / "other.csv", [{"text": "Other."}])
    assert LocalFiles(str(tmp_path), str(other)).load()["test"]["text"][:] == ["Other."]


def test_unpacked_acl_imdb(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            for i in range(2):
                path = tmp_path / split / label / f"{i}_7.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{split} {label} {i}<br />é", encoding="utf-8")
    (tmp_path / "train" / "urls_pos.txt").write_text("http://")
    data = LocalFiles(str(tmp_path)).load()
    assert data["train"]["text"][:] == [f"train {label} {i}\né" for label in ("neg", "pos") for i in range(2)]
    assert data["test"]["label"][:] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "labels", [(1, 0), (True, False), ("1", "0"), ("pos", "neg"), ("Positive", " NEGATIVE"), (1.0, 0.0)]
)
def test_labels(labels: tuple[Any, Any]) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": list(labels)})
    assert sources.normalise(rows, "mine")["label"][:] == [1, 0]


def test_class_labels_go_by_name() -> None:
    feature = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"]))
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1]}, features=feature)
    assert sources.normalise(rows, "mine")["label"][:] == [1, 0]


@pytest.mark.parametrize("label", [2, -1, "good", None, 0.5])
def test_unknown_label(label: Any) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS[:1], "label": [label]})
    with pytest.raises(InputError, match=r"mine: row 0: 'label' is .*; write 0 or 1, .* neg or pos"):
        sources.normalise(rows, "mine")


def test_columns_of_trl_are_kept() -> None:
    messages = [{"role": "user", "content": "Hi<br />"}]
    rows = datasets.Dataset.from_dict({"prompt": [messages], "chosen": ["a<br/>b"], "rejected": ["c"], "id": [7]})
    assert sources.normalise(rows, "mine")[0] == {
        "prompt": messages,
        "chosen": "a\nb",
        "rejected": "c",
        "id": 7,
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, r"mine: no column 'text' or 'prompt'; rename .*: body"),
        (
            {"chosen": ["a"], "rejected": ["b"]},
            r"mine: row 0: no column 'prompt', and 'chosen' and 'rejected' do not",
        ),
        ({"text": []}, r"mine: no rows"),
        ({"text": ["a", " "]}, r"mine: row 1: 'text' is empty; fill it in or drop"),
        ({"text": ["a", None]}, r"mine: row 1: 'text' is None; write a text$"),
        ({"prompt": [3]}, r"mine: row 0: 'prompt' is 3; write a text or a list of role and content"),
        ({"prompt": [[{"role": "user"}]]}, r"mine: row 0: 'prompt' is .*role and content"),
        ({"prompt": [[]]}, r"mine: row 0: 'prompt' is \[\]; write"),
    ],
)
def test_unusable_columns(table: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sources.normalise(datasets.Dataset.from_dict(table), "mine")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "no such file or folder; check the path"),
        ("reviews.csv", b"", "reviews.csv is empty; write it again"),
        ("reviews.xml", b"<a/>", r"unknown format '.xml'; use one of .parquet, .csv"),
        ("reviews.parquet", b"PAR1cut off", "cannot be read as parquet .*; write it again"),
        ("reviews.jsonl", b'{"text": "a"}\n{"text": "cut o', "cannot be read as json .*; write it again"),
        ("reviews.csv", b'text,label\n"a', "cannot be read as csv .*; write it again"),
        ("reviews.csv", b"text\n", "no rows"),
        ("reviews.txt", b"\n \n", "no rows"),
        ("reviews.txt", b"\xff\xfe\xfa", "cannot be read as text .*; write it again"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^data.source.train: .*{name}.*{message}.*") as caught:
        LocalFiles(str(path)).load()
    assert "\n" not in str(caught.value)


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.source.train: .* neither train\* files .* nor train/pos"):
        LocalFiles(str(tmp_path)).load()
    write(tmp_path / "train.csv", [{"text": "a"}])
    write(tmp_path / "train.json", [{"text": "a"}])
    with pytest.raises(InputError, match=r"mixes .csv, .json; keep one format"):
        LocalFiles(str(tmp_path)).load()
    with pytest.raises(InputError, match=r"data.source.test: .*no such file"):
        LocalFiles(str(tmp_path / "train.csv"), str(tmp_path / "test.csv")).load()
    for label in ("pos", "neg"):
        (tmp_path / "acl" / "train" / label).mkdir(parents=True)
    (tmp_path / "acl" / "train" / "pos" / "0_9.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"cannot read .*0_9.txt.*; unpack the archive again"):
        LocalFiles(str(tmp_path / "acl")).load()


def test_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"data.source.name: .*nobody/nothing.*LocalFiles.*HF_HUB_OFFLINE=1"):
        HubDataset("nobody/nothing").load()
    assert time.perf_counter() - start < 5


def test_hub_dataset_loads_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, split: dict[str, str]) -> datasets.DatasetDict:
        if "unlabelled" in split.values():
            raise ValueError("Unknown split\n'unlabelled'")
        rows = datasets.Dataset.from_dict({"text": [f"{name} {config} <br />"]})
        return datasets.DatasetDict(dict.fromkeys(split, rows))

    monkeypatch.setattr(sources, "load_dataset", load)
    data = HubDataset("a/b", "plain", test_split=None).load()
    assert {split: rows["text"][:] for split, rows in data.items()} == {"train": ["a/b plain \n"]}
    with pytest.raises(InputError, match=r"data.source.name: a/b: Unknown split 'unlabelled'; check name"):
        HubDataset("a/b", train_split="unlabelled").load()


def test_bundled_reviews_are_quiet_and_reproducible(capfd: pytest.CaptureFixture[str]) -> None:
    data = BundledReviews(num_train=40, num_test=20, seed=5).load()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 40, "test": 20}
    assert not set(data["train"]["text"]) & set(data["test"]["text"])
    assert sum(data["test"]["label"]) == 10
    assert data["train"][:] == BundledReviews(num_train=40, num_test=20, seed=5).load()["train"][:]
    assert capfd.readouterr() == ("", "")


def test_bundled_sums_are_split_and_counted() -> None:
    data = BundledSums(num_train=40, num_test=20, carries=1.0, seed=5).load()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 40, "test": 20}
    assert not set(data["train"]["prompt"]) & set(data["test"]["prompt"])
    assert data["test"]["answer"] == [text.split("\n")[-1] for text in data["test"]["completion"]]
    with pytest.raises(InputError, match=r"data\.source: 51598 sums are asked for; there are 51597"):
        BundledSums(num_train=51_000, num_test=598)
