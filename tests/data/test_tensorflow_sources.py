"""A TFDS data set and a seqio task, both made here, are prepared and read as the same records given as Python values."""

import functools

import numpy as np
import pytest

import data
from partitioning.errors import UserError

# `make test-all` installs TensorFlow; these need it, and fail without it.
pytestmark = pytest.mark.long
EXAMPLES = [{"text": f"document {i} é", "tags": [f"a{i}", "b"], "score": i / 4, "wrong": i % 2 == 0} for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the TFDS data set `tiny_texts`."""
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        """Thirty documents."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            tags = tfds.features.Sequence(tfds.features.Text())
            features = {"text": tfds.features.Text(), "tags": tags, "score": np.float32, "wrong": np.bool_}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(EXAMPLES[:20]), "test": self._generate_examples(EXAMPLES[20:])}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    made = str(tmp_path_factory.mktemp("tfds"))
    TinyTexts(data_dir=made).download_and_prepare()
    return made


def test_a_tfds_data_set_is_prepared_and_read(folder, tmp_path):
    fields = {"query": "text", "candidates": "tags", "relevance": "score"}
    found = list(data.Tfds("tiny_texts", "train", fields=fields, folder=folder))
    assert sorted(found, key=lambda r: r["relevance"]) == [
        {"query": e["text"], "candidates": e["tags"], "relevance": e["score"]} for e in EXAMPLES[:20]
    ]
    source = data.Tfds("tiny_texts:1.0.0", "test[:50%]", folder=folder)
    assert len(list(source)) == 5
    train = data.Tfds("tiny_texts", folder=folder)
    assert list(train) == list(train)
    cached = data.Cached(task=data.Task(name="tiny", train=train), folder=str(tmp_path), epochs=1)
    cached.prepare()
    held = data.Records(examples=list(train), epochs=1)
    one, other = (d.open().batch(0, batch_size=8, length=128, seed=0) for d in (cached, held))
    tokens = [sorted(b["tokens"][b["segments"] > 0].tolist()) for b in (one, other)]
    assert tokens[0] == tokens[1]


def test_what_a_tfds_data_set_lacks_is_one_line(folder, tmp_path):
    wrong = {
        r"TFDS data set 'tiny_nothing', split 'train': ": data.Tfds("tiny_nothing", folder=folder),
        r"TFDS data set 'tiny_texts', split 'dev': ": data.Tfds("tiny_texts", "dev", folder=folder),
        r"'tiny_texts', train, record 0: no field 'body'; the record has score, ": data.Tfds(
            "tiny_texts", field="body", folder=folder
        ),
        r"'tiny_texts', train, record 0: field 'wrong' holds bool": data.Tfds(
            "tiny_texts", field="wrong", folder=folder
        ),
        r"'tiny_texts', split 'test\[:0\]': .*no data": data.Tfds("tiny_texts", "test[:0]", folder=folder),
    }
    for message, source in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            data.prepare(data.Task(name="t", train=source), str(tmp_path))
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []


def test_a_seqio_task_gives_its_text_before_its_own_tokens(tmp_path):
    import seqio
    import tensorflow as tf

    def texts(split, shuffle_files, seed=None):
        given = EXAMPLES[:20] if split == "train" else EXAMPLES[20:]
        return tf.data.Dataset.from_tensor_slices({"text": [example["text"] for example in given]})

    @seqio.map_over_dataset(num_seeds=1)
    def numbered(example, seed):
        number = tf.strings.as_string(tf.random.stateless_uniform([], seed, 0, 1000, tf.int32))
        return {**example, "targets": tf.strings.join([example["targets"], " ", number])}

    vocabulary = seqio.ByteVocabulary()
    seqio.TaskRegistry.add(
        "tiny_task",
        source=seqio.FunctionDataSource(texts, splits=("train", "validation")),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"inputs": "text", "targets": "text"}),
            numbered,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        output_features={name: seqio.Feature(vocabulary) for name in ("inputs", "targets")},
    )
    found = [record["text"] for record in data.SeqioTask("tiny_task")]
    assert [text.rsplit(" ", 1)[0] for text in found] == [example["text"] for example in EXAMPLES[:20]]
    assert len({text.rsplit(" ", 1)[1] for text in found}) > 10
    # seqio's own pipeline, decoded, for the feature without a draw.
    theirs = seqio.get_mixture_or_task("tiny_task").get_dataset(None, "validation", shuffle=False)
    ours = data.SeqioTask("tiny_task", "validation", field="inputs")
    assert [r["text"] for r in ours] == [
        vocabulary.decode(e["inputs"][:-1].tolist()) for e in theirs.as_numpy_iterator()
    ]
    task = data.Task(name="tiny", train=data.SeqioTask("tiny_task"), validation=ours)
    folder = data.prepare(task, str(tmp_path))
    assert data.prepare(task, str(tmp_path)) == folder
    counts = {name: entry["examples"] for name, entry in data.Cache(folder).manifest["splits"].items()}
    assert counts == {"train": 20, "validation": 10}
    with pytest.raises(UserError, match=r"no seqio task 'tiny'; registered are .*tiny_task"):
        list(data.SeqioTask("tiny"))
    with pytest.raises(UserError, match="'tiny_task': no split 'test'; there is train, validation"):
        list(data.SeqioTask("tiny_task", "test"))


@pytest.mark.parametrize("source", [data.Tfds("anything"), data.SeqioTask("anything")])
def test_without_the_packages_it_says_what_to_install(source, monkeypatch):
    for name in ("tensorflow_datasets", "seqio"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UserError, match=r"anything: reading it needs .*pip install 'palmette\[data\]'"):
        list(source)
