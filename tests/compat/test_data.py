"""Data come in the order of transformers, are collated as there, and are what the model takes."""

import copy
import pickle

import datasets
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import IterableDataset

import forgather.ml as ours
from forgather.ml.trainer.feed import Keyed
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import Regression, rows

BOTH = (ours, transformers)
PLAIN = {"save_strategy": "no"}


class Sees(Regression):
    """Keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, labels=None):
        if self.training:
            self.seen.append(x[:, 0].tolist())
        return super().forward(x, labels)


def order(library, folder, prepare=None, **options):
    made = trainer(library, folder, model=Sees(), **{**PLAIN, "max_steps": -1, "num_train_epochs": 2, **options})
    if prepare:
        prepare(made)
    made.train()
    return made.model.seen, made.state.global_step, made.state.epoch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 7},
        {"data_seed": 3},
        {"train_sampling_strategy": "sequential"},
        {"dataloader_drop_last": True},
        {"gradient_accumulation_steps": 4},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
        {"num_train_epochs": 0.6},
        {"max_steps": 8},
    ],
    ids=str,
)
def test_the_order_is_that_of_transformers(options, tmp_path):
    assert order(ours, tmp_path, **options) == order(transformers, tmp_path, **options)


class Endless(IterableDataset):
    def __init__(self, count):
        self.rows = rows("regression", count)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        yield from self.rows


@pytest.mark.parametrize("count", [9, 40])
def test_iterable_data_are_read_as_in_transformers(count, tmp_path):
    found = []
    for library in BOTH:
        data = Endless(count)

        def prepare(made, data=data):
            made.train_dataset = data

        seen, steps, epoch = order(library, tmp_path, prepare, max_steps=5)
        found.append((seen, steps, round(epoch, 6), sorted(set(data.epochs))))
    assert found[0] == found[1]


def test_the_last_window_of_an_iterable_is_a_step_of_its_own(tmp_path):
    """Transformers leaves its gradient in place, where the next epoch's first step finds it."""
    made = trainer(ours, tmp_path, max_steps=4, gradient_accumulation_steps=2, **PLAIN)
    made.train_dataset = Endless(9)
    made.train()
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert len(losses) == 4
    large = trainer(ours, tmp_path, max_steps=4, per_device_train_batch_size=8, **PLAIN)
    large.train_dataset = Endless(9)
    large.train()
    assert losses == pytest.approx([log["loss"] for log in large.state.log_history if "loss" in log], rel=1e-5)


def test_an_iterable_that_is_empty_ends_the_training(tmp_path):
    made = trainer(ours, tmp_path, max_steps=5, **PLAIN)
    made.train_dataset = Endless(0)
    assert made.train().global_step == 0


def test_samples_of_similar_length_come_together(tmp_path):
    lengths = []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(23, 1)

        def forward(self, input_ids, labels=None):
            lengths.append(input_ids.shape[1])
            return {"loss": self.words(input_ids).square().mean()}

    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(23, (int(n),), generator=generator)}
        for n in torch.randint(1, 30, (64,), generator=generator)
    ]

    def collate(samples):
        width = max(len(sample["input_ids"]) for sample in samples)
        padded = [nn.functional.pad(sample["input_ids"], (0, width - len(sample["input_ids"]))) for sample in samples]
        return {"input_ids": torch.stack(padded)}

    def padding(strategy):
        lengths.clear()
        made = trainer(
            ours, tmp_path, model=Looks(), train_sampling_strategy=strategy, max_steps=-1, num_train_epochs=1, **PLAIN
        )
        made.train_dataset, made.data_collator = data, collate
        made.train()
        return sum(lengths), lengths[0]

    grouped, first = padding("group_by_length")
    assert grouped < padding("random")[0] * 0.8
    assert first == max(len(sample["input_ids"]) for sample in data)


def test_grouping_is_that_of_transformers():
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from forgather.ml.trainer.sampler import grouped_by_length

    lengths = torch.randint(1, 50, (333,), generator=torch.Generator().manual_seed(0)).tolist()
    for batch_size in (1, 4, 100, 400):
        one, other = (torch.Generator().manual_seed(5) for _ in range(2))
        expected = get_length_grouped_indices(lengths, batch_size, generator=other)
        assert grouped_by_length(lengths, batch_size, one) == expected


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    made = trainer(ours, tmp_path, **PLAIN)
    made.train_dataset = [{**row, "text": "some", "idx": [1, 2]} for row in rows("regression")]
    assert made.train().global_step == 6
    kept = trainer(ours, tmp_path, remove_unused_columns=False, **PLAIN)
    kept.train_dataset = [{**row, "idx": i} for i, row in enumerate(rows("regression"))]
    with pytest.raises(TypeError, match="unexpected keyword argument 'idx'"):
        kept.train()


def test_data_that_have_nothing_for_the_model_are_refused(tmp_path):
    made = trainer(ours, tmp_path, **PLAIN)
    made.train_dataset = [{"text": "some"}] * 8
    with pytest.raises(ValueError, match=r"No columns in the dataset match the arguments of Regression\.forward"):
        made.train()


def test_a_model_that_takes_anything_gets_everything(tmp_path):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Regression()

        def forward(self, **inputs):
            inputs.pop("num_items_in_batch", None)
            return self.inner(**inputs)

    made = trainer(ours, tmp_path, model=Takes(), **PLAIN)
    assert made.train().global_step == 6


class Opened(torch.utils.data.Dataset):
    """Reads from what its workers open."""

    def __init__(self):
        self.file = None

    def open(self):
        self.file = rows("regression")

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return self.file[i]


def open_in_worker(number):
    torch.utils.data.get_worker_info().dataset.open()


@pytest.mark.parametrize("library", BOTH)
def test_workers_see_the_data_set_of_the_user(library, tmp_path):
    class Mine(library.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=8, num_workers=1, worker_init_fn=open_in_worker
            )

    made = trainer(library, tmp_path, cls=Mine, max_steps=2, **PLAIN)
    made.train_dataset = Opened()
    assert made.train().global_step == 2


def test_what_workers_see_is_sent_to_them_whole():
    sent = pickle.loads(pickle.dumps(copy.copy(Keyed(Opened(), 1))))
    sent.open()
    assert len(sent.__getitems__([(0, 3), (0, 4)])) == 2
    with pytest.raises(AttributeError, match="close"):
        sent.close()


def test_the_loader_is_one_of_torch(tmp_path):
    made = trainer(ours, tmp_path, dataloader_drop_last=True)
    loader = made.get_train_dataloader()
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert (len(loader), loader.batch_size, loader.drop_last) == (5, 4, True)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert made.num_examples(loader) == 22
    evaluated = made.get_eval_dataloader()
    assert isinstance(evaluated.sampler, torch.utils.data.SequentialSampler)
    assert evaluated.batch_size == 8
    assert len(made.get_test_dataloader(rows("regression", 9)).dataset) == 9


def test_a_data_set_of_columns_loses_those_that_are_unused(tmp_path):
    class Columns(list):
        """What the trainer needs of a ``datasets.Dataset``."""

        @property
        def column_names(self):
            return list(self[0])

        def remove_columns(self, names):
            return Columns({name: row[name] for name in row if name not in names} for row in self)

    made = trainer(ours, tmp_path, **PLAIN)
    made.train_dataset = Columns({**row, "text": "some"} for row in rows("regression"))
    assert made.train().global_step == 6
    made.train_dataset = Columns([{"text": "some"}] * 8)
    with pytest.raises(ValueError, match="No columns in the dataset match the model's forward method signature"):
        made.train()


def test_a_stream_that_does_not_know_its_columns_is_read_as_in_transformers(tmp_path):
    def samples():
        for row in rows("regression"):
            yield {"x": row["x"].tolist(), "labels": float(row["labels"]), "text": "some"}

    losses = []
    for library in BOTH:
        made = trainer(library, tmp_path / library.__name__, logging_steps=1, **PLAIN)
        made.train_dataset = datasets.IterableDataset.from_generator(samples)
        assert made.train_dataset.column_names is None
        made.train()
        losses.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
