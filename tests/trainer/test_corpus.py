import sysconfig
from pathlib import Path

import pytest
from gossamer.trainer.corpus import first_chars, read_documents


def test_default_is_library_source_and_repeats():
    texts = list(read_documents(None, 300_000))
    assert texts == list(read_documents(None, 300_000))
    assert sum(map(len, texts)) == 300_000
    assert len(texts) > 5
    library = Path(sysconfig.get_path("stdlib"))
    first = texts[0].encode()
    same_size = [p for p in library.rglob("*.py") if p.stat().st_size == len(first)]
    names = [p for p in same_size if p.read_bytes() == first]
    assert names and not {"test", "tests", "site-packages"} & set(names[0].parts)


def test_fewer_characters_are_a_prefix():
    many, few = list(read_documents(None, 200_000)), list(read_documents(None, 50_000))
    assert few == list(first_chars(many, 50_000))


def test_folder_order_does_not_depend_on_creation(tmp_path):
    texts = {f"{name}.txt": name * 3 for name in "abcdef"} | {"sub/tests/g.py": "ggg"}
    orders = []
    for folder, names in (("one", list(texts)), ("two", list(reversed(texts)))):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(texts[name])
        (tmp_path / folder / "image.png").write_bytes(b"\xff\xfe")
        orders.append(list(read_documents(str(tmp_path / folder), 1000)))
    assert (
        orders[0] == orders[1] == [letter * 3 for letter in "efdgacb"]
    )  # a saved run depends on it


def test_single_file_and_cut(tmp_path):
    path = tmp_path / "speech.dat"
    path.write_text("abcdefgh")
    assert list(read_documents(str(path), 5)) == ["abcde"]
    assert list(first_chars(["ab", "cd", "ef"], 4)) == ["ab", "cd"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
    ],
)
def test_unusable_path_is_refused(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{sentence}"):
        list(read_documents(str(path), 100))
