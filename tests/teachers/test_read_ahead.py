"""Reading ahead, when steps do not go as they were announced."""

import pytest
import torch

from torchtune_kd.data.batches import Batch
from torchtune_kd.errors import RunError
from torchtune_kd.teachers.read_ahead import ReadAhead


class Reading:
    def __init__(self, documents, problem):
        self._documents, self._problem = documents, problem

    def columns(self):
        if self._problem is not None:
            raise RunError(self._problem)
        return {"lengths": torch.tensor([document.length for document in self._documents])}


class Reader:
    """Remembers what it is asked for; the reading of a document of ``bad`` tokens fails."""

    def __init__(self, bad=None):
        self.asked, self.closed, self._bad = [], False, bad

    def read(self, documents):
        lengths = [document.length for document in documents]
        self.asked.append(lengths)
        return Reading(documents, "it is gone" if self._bad in lengths else None)

    def close(self):
        self.closed = True


def batch(length):
    tokens = torch.arange(length).unsqueeze(0)
    return Batch(tokens, tokens.clone(), lengths=[[length]])


def taken(ahead, of):
    places, columns = ahead.take(of)
    assert len(places) == int(columns["lengths"][0])
    return len(places)


@pytest.fixture
def batches():
    return [batch(length) for length in (2, 3, 4, 5)]


def test_in_the_order_of_the_announcements_each_is_read_once(batches):
    reader = Reader()
    ahead = ReadAhead(reader, -100, torch.device("cpu"))
    for each in batches[:2]:
        ahead.expect(each)
    assert reader.asked == [[2], [3]]
    assert [taken(ahead, each) for each in batches[:2]] == [2, 3] and reader.asked == [[2], [3]]


def test_what_a_step_that_was_given_up_had_announced_is_dropped(batches):
    """The next batch is announced, or not: it gets its own rows."""
    reader = Reader()
    ahead = ReadAhead(reader, -100, torch.device("cpu"))
    for each in batches[:3]:
        ahead.expect(each)
    assert taken(ahead, batches[0]) == 2  # then a signal comes, and the step ends
    ahead.expect(batches[3])
    assert taken(ahead, batches[3]) == 5 and reader.asked == [[2], [3], [4], [5]]
    assert taken(ahead, batches[1]) == 3 and reader.asked[4:] == [[3]]  # begun anew


def test_a_batch_that_cannot_be_read_spoils_no_other(batches):
    ahead = ReadAhead(Reader(bad=3), -100, torch.device("cpu"))
    for each in batches[:3]:
        ahead.expect(each)
    assert taken(ahead, batches[0]) == 2
    with pytest.raises(RunError, match="it is gone"):
        ahead.take(batches[1])
    assert taken(ahead, batches[2]) == 4


def test_the_end_reaches_the_reader(batches):
    reader = Reader()
    ahead = ReadAhead(reader, -100, torch.device("cpu"))
    ahead.expect(batches[0])
    ahead.close()
    assert reader.closed
