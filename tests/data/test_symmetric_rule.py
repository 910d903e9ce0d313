from pathlib import Path

import numpy as np
import torch

from sfumato.data import symmetric_rule_12bit

STORED = np.load(Path(__file__).parents[1] / "vectors" / "adaptive-information.npz")


def test_labels_of_the_reference():
    task = symmetric_rule_12bit()
    labels = torch.from_numpy(np.unpackbits(STORED["var_u_label_bits"])).long()
    assert torch.equal(task.label, labels)
    assert torch.equal(task.label[STORED["x_codes"]], torch.from_numpy(STORED["y"]).long())


def test_rows_are_the_bits_of_their_index():
    task = symmetric_rule_12bit()
    powers = 2 ** torch.arange(11, -1, -1)
    assert torch.equal((task.x @ powers.float()).long(), torch.arange(4096))
    assert torch.equal(task.index, torch.arange(4096))


def test_a_turn_of_the_icosahedron_changes_no_label():
    # the five neighbours of corner 0, and those of its opposite corner 9, each go one place round
    turn = list(range(12))
    for a, b in [(1, 3), (3, 10), (10, 5), (5, 11), (11, 1)]:
        turn[a] = b
    for a, b in [(7, 6), (6, 4), (4, 2), (2, 8), (8, 7)]:  # the opposites of the same
        turn[a] = b
    task = symmetric_rule_12bit()
    turned = (task.x[:, turn] @ (2.0 ** torch.arange(11, -1, -1))).long()
    assert not torch.equal(turned, torch.arange(4096))
    assert torch.equal(task.label[turned], task.label)
