"""How a step looks at its tensors, in C and in Python: no change goes unseen, and no address is of a tensor that is gone."""

from array import array

import pytest
import torch

from agr_hf.optim.backends import look as looks


def given_rows(rows=3):
    """What `look` is given of rows of 2 x 3 elements, with their kinds and the table that it fills."""
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(rows)]
    grads = [torch.ones(2, 3) for _ in range(rows)]
    steps = torch.zeros(rows)
    states = [{"m": torch.zeros(2, 3), "step": step} for step in steps.unbind()]
    columns = [("step", [state["step"] for state in states], steps.data_ptr(), 4)]
    kinds = [
        tensor for param, grad, state in zip(params, grads, states, strict=True) for tensor in (param, grad, state["m"])
    ]
    return [params, grads, states, ("m",), columns], kinds, array("q", bytes(8 * len(kinds)))


def functions_in(language):
    if language == "Python":
        return looks.look_in_python, looks.describe_in_python
    if looks.look is looks.look_in_python:
        pytest.skip("the C extension is not built: it needs a C compiler when the package is installed")
    return looks.look, looks.describe


def negated():
    return torch.view_as_complex(torch.ones(2, 3, 2)).conj().imag.as_strided((2, 3), (3, 1))


class Other(torch.Tensor):
    pass


CHANGES = {
    "nothing": (lambda given: None, 3),
    "no gradient": (lambda given: given[1].__setitem__(1, None), 2),
    "another address": (lambda given: given[1].__setitem__(1, torch.ones(2, 3)), 3),
    "another shape": (lambda given: given[1].__setitem__(1, torch.ones(3, 2)), -1),
    "another memory format": (lambda given: given[1].__setitem__(1, torch.ones(3, 2).t()), -1),
    "another dtype": (lambda given: given[1].__setitem__(1, torch.ones(2, 3).bfloat16()), -1),
    "another device": (lambda given: given[1].__setitem__(1, torch.ones(2, 3, device="meta")), -1),
    "another type": (lambda given: given[1].__setitem__(1, torch.ones(2, 3).as_subclass(Other)), -1),
    "another number of dimensions": (lambda given: given[1].__setitem__(1, torch.ones(2, 3, 1)), -1),
    "another layout": (lambda given: given[1].__setitem__(1, torch.ones(2, 3).to_sparse()), -1),
    "negated as it is read": (lambda given: given[1].__setitem__(1, negated()), -1),
    "zero as it is read": (lambda given: given[1].__setitem__(1, torch._efficientzerotensor((2, 3))), -1),
    "no parameter": (lambda given: given[0].__setitem__(1, None), -1),
    "state that is gone": (lambda given: given[2][1].pop("m"), -1),
    "state of another dtype": (lambda given: given[2][1].update(m=torch.zeros(2, 3).double()), -1),
    "a number that was replaced": (lambda given: given[2][1].update(step=torch.tensor(0.0)), -1),
    "a number in other memory": (lambda given: setattr(given[2][1]["step"], "data", torch.tensor(0.0)), -1),
}


@pytest.mark.parametrize("language", ["C", "Python"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_look_sees_every_change_in_both_languages(change, language):
    look, describe = functions_in(language)
    given, kinds, addresses = given_rows()
    kept = describe(kinds)
    assert look(*given, kept, addresses) == 3
    make_change, count = CHANGES[change]
    make_change(given)
    assert look(*given, kept, addresses) == count
    if count >= 0:
        found = [0 if tensor is None else tensor.data_ptr() for tensor in [*given[0], *given[1]]]
        assert list(addresses) == [*found, *[state["m"].data_ptr() for state in given[2]]]


@pytest.mark.parametrize("language", ["C", "Python"])
def test_a_look_knows_a_tensor_without_elements_from_none(language):
    look, describe = functions_in(language)
    empty = [torch.empty(0, 3) for _ in range(3)]
    addresses = array("q", [7] * 3)
    given = [[empty[0]], [empty[1]], [{"m": empty[2]}], ("m",), []]
    assert look(*given, describe(empty), addresses) == 1
    assert list(addresses) == [1, 1, 1]
    given[1] = [None]
    assert look(*given, describe(empty), addresses) == 0
    assert list(addresses) == [1, 0, 1]


def test_a_look_under_a_mode_that_changes_the_state_reads_no_freed_memory():
    given, kinds, addresses = given_rows(64)
    look, describe = functions_in("C")
    kept = describe(kinds)

    class Forget(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            for state in given[2]:
                state.clear()
            return function(*args, **(kwargs or {}))

    with Forget():
        assert look(*given, kept, addresses) in (-1, 64)


def test_a_look_far_ahead_meets_anything():
    """Memory is asked for before its objects are looked at."""
    given, kinds, addresses = given_rows(64)
    look, describe = functions_in("C")
    kept = describe(kinds)
    given[1][40] = None
    assert look(*given, kept, addresses) == 63
    assert list(addresses[:64]) == [param.data_ptr() for param in given[0]]
    for stranger in (None, 1.5, "m", torch.ones(2, 3).as_subclass(Other)):
        given[2][50]["m"] = stranger
        assert look(*given, kept, addresses) == -1


@pytest.mark.parametrize("language", ["C", "Python"])
def test_each_row_is_compared_with_its_own_description(language):
    look, describe = functions_in(language)
    tensors = [torch.ones(shape) for shape in [(2, 3), (3, 2), (6,), (), (2, 3), (6,)]]
    addresses = array("q", bytes(8 * 12))
    given = [tensors, list(tensors), [{} for _ in tensors], (), []]
    kept = describe([tensor for tensor in tensors for _ in range(2)])
    assert look(*given, kept, addresses) == 6
    assert list(addresses) == 2 * [tensor.data_ptr() for tensor in tensors]
    given[1][0], given[1][4] = given[1][4], given[1][0]  # of one kind
    assert look(*given, kept, addresses) == 6
    given[1][1], given[1][4] = given[1][4], given[1][1]  # of two
    assert look(*given, kept, addresses) == -1


@pytest.mark.parametrize("language", ["C", "Python"])
def test_an_object_that_got_another_tensor_is_read_anew(language):
    look, describe = functions_in(language)
    given, kinds, addresses = given_rows()
    kept = describe(kinds)
    other = torch.zeros(2, 3)
    address = other.data_ptr()
    torch.utils.swap_tensors(given[1][2], other)
    assert look(*given, kept, addresses) == 3
    assert addresses[5] == address
    torch.utils.swap_tensors(given[1][2], torch.zeros(3, 2))
    assert look(*given, kept, addresses) == -1


def test_torch_is_asked_nothing_that_it_would_complain_of(capfd):
    """Its functions for C print what they fail of: a sparse tensor has no strides, and no memory of its own."""
    given, kinds, addresses = given_rows()
    look, describe = functions_in("C")
    kept = describe(kinds)
    given[1][1] = torch.ones(2, 3).to_sparse()
    assert look(*given, kept, addresses) == -1
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN, whose tensors the test makes"
)
def test_a_tensor_whose_memory_is_a_librarys_is_not_described():
    _, describe = functions_in("C")
    with pytest.raises(ValueError, match="entry 0 is no tensor with memory of its own"):
        describe([torch.ones(4, 4).to_mkldnn()])


def test_the_extension_looks_at_nothing_where_torch_lays_its_objects_in_another_way():
    functions_in("C")
    tensor = torch.empty(0)
    library = str(looks.find_torch())
    try:
        assert not looks._native.use_torch(library, *looks.TYPES, tensor, 1)
        assert not looks._native.use_torch(
            library.replace("libtorch_cpu", "libc10"), *looks.TYPES, tensor, tensor._cdata
        )
        assert not looks._native.use_torch("no such library", *looks.TYPES, tensor, tensor._cdata)
    finally:
        assert looks.use_torch()
