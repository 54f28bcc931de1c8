from hpctrain.errors import nearest


def test_nearest_without_legal_names():
    assert nearest("x", []) == "none are legal here"


def test_nearest_lists_the_close_one_first():
    assert nearest("batchh", ["bat", "batch", "zebra"]) == "did you mean batch, bat?"
