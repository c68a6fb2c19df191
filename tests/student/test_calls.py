"""What belongs to a call stays with it: between threads, tasks, generators and nested forwards, after errors, and in backward passes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from torch import nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

import edit_compile as ec
import toy
from edit_compile.distillation.train.features import captured
from edit_compile.student.site import converted_sites

pytestmark = pytest.mark.usefixtures("compiled_once")

TEXT = 5
WIDE, TALL = toy.inputs(2, 8, 12, TEXT, 3), toy.inputs(2, 12, 8, TEXT, 4)
FORWARDS = 200


@pytest.fixture(scope="module")
def base():
    return toy.shaken(toy.Toy(joint=True).eval())


@pytest.fixture(scope="module")
def plan(base):
    return ec.plan(base, example_inputs=toy.inputs(text=TEXT))


@pytest.fixture
def student(base, plan):
    student = ec.linearize(base, plan=plan)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), amount=0.1)
    return student


@torch.no_grad()
def call(model, inputs):
    return model(**inputs)


@pytest.fixture
def often_switched():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def workloads(student):
    """What is called, in which mode, and what it gives when nothing else runs."""
    found = []
    for inputs, mode in ((WIDE, contextlib.nullcontext), (TALL, lambda: ec.teacher(student)), (TALL, contextlib.nullcontext)):
        with mode():
            found.append((inputs, mode, call(student, inputs)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "blocks", "whole"])
def test_threads_of_two_shapes_and_a_teacher(student, often_switched, how):
    work = workloads(student)
    torch._dynamo.reset()
    model = student
    if how == "blocks":
        ec.compile(student, backend="eager")
    elif how == "whole":
        # Guards of a whole model fail where threads change within one: torch compiles again up to its limit, where fullgraph is an error.
        model = torch.compile(student, dynamic=True, backend="eager")
    for inputs, mode, _ in work:  # dynamo compiles in one thread at a time
        with mode():
            call(model, inputs)

    def serve(inputs, mode, expected, forwards=FORWARDS):
        with mode():
            return sum(not torch.allclose(call(model, inputs), expected, atol=1e-5) for _ in range(forwards))

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for each in work:  # a new thread each
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(serve, *each, 1).result() == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    with ThreadPoolExecutor(3 * len(work)) as pool:
        assert list(pool.map(serve, *zip(*3 * work, strict=True))) == 9 * [0]
    if how == "blocks":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["eager", "whole"])
def test_tasks_of_two_shapes_and_a_teacher(student, how):
    work = workloads(student)
    torch._dynamo.reset()
    model = torch.compile(student, dynamic=True, fullgraph=True, backend="eager") if how == "whole" else student

    async def serve(inputs, mode, expected):
        wrong = 0
        with mode():
            for _ in range(FORWARDS):
                await asyncio.sleep(0)
                wrong += not torch.allclose(call(model, inputs), expected, atol=1e-5)
        return wrong

    async def serve_all():
        return await asyncio.gather(*(serve(*each) for each in work))

    assert asyncio.run(serve_all()) == [0, 0, 0]
    torch._dynamo.reset()


def test_tasks_that_state_different_grids(base):
    """Position ids are not there, and the count of tokens allows several grids."""
    student = ec.linearize(base, example_inputs=toy.inputs(text=TEXT))
    expected = {(4, 6): call(student, WIDE), (6, 4): call(student, TALL)}

    async def serve(sizes, inputs):
        with ec.grid(student, *sizes):
            for _ in range(20):
                await asyncio.sleep(0)
                assert torch.equal(call(student, inputs), expected[sizes])

    async def serve_all():
        await asyncio.gather(serve((4, 6), WIDE), serve((6, 4), TALL))

    asyncio.run(serve_all())


@pytest.mark.parametrize("compiled", [False, True])
def test_forwards_inside_forwards(base, plan, student, compiled):
    """A hook runs the same student and another one, at another size; the outer forward goes on with its own grid and mode."""
    other = ec.linearize(base, plan=plan)
    expected, inner = call(student, WIDE), (call(student, TALL), call(other, TALL))
    with ec.teacher(other):
        taught = call(other, TALL)
    torch._dynamo.reset()
    if compiled:
        ec.compile(student, backend="eager")
    found = []

    def hook(module, args):
        if not found:
            found.append(None)  # the inner forwards come here too
            found.extend([call(student, TALL), call(other, TALL)])
            with ec.teacher(other):
                found.append(call(other, TALL))

    place = student.patch if compiled else student.blocks[1]  # compiled blocks would trace the hook
    handle = place.register_forward_pre_hook(hook)
    outer = call(student, WIDE)
    handle.remove()
    torch.testing.assert_close(outer, expected)
    torch.testing.assert_close(tuple(found[1:]), (*inner, taught))
    torch._dynamo.reset()


def test_teachers_may_be_left_in_any_order(base, student):
    expected, taught = call(student, WIDE), call(base, WIDE)
    first, second = ec.teacher(student), ec.teacher(student)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(call(student, WIDE), taught)
    second.__exit__(None, None, None)
    assert torch.equal(call(student, WIDE), expected)


@pytest.mark.parametrize("statement", [ec.teacher, lambda student: ec.grid(student, 4, 6)], ids=["teacher", "grid"])
def test_what_holds_for_a_call_holds_in_its_replicas_for_data_parallel(student, statement):
    """Which other threads run, as `nn.DataParallel` has them; afterwards, and for replicas made outside, it does not."""
    outside = student._replicate_for_data_parallel()
    with statement(student):
        inside = student._replicate_for_data_parallel()
        expected = call(student, WIDE)
        with ThreadPoolExecutor(1) as pool:
            found, other = (pool.submit(call, replica, WIDE).result() for replica in (inside, outside))
            if statement is not ec.teacher:
                with pytest.raises(ec.GridError, match="stated as 4 x 6"):
                    pool.submit(call, inside, TALL).result()
    assert torch.equal(found, expected)
    assert torch.equal(other, call(student, WIDE))
    assert isinstance(inside, toy.Toy)


class Values(TorchFunctionMode):
    """Gives the values in the place of attention, as perturbed-attention guidance does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return args[2]
        return func(*args, **(kwargs or {}))


def kernel_by_hand(query, key, value, mask=None, **options):
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def test_what_changes_attention_from_outside_is_refused_at_converted_sites(base, student, monkeypatch):
    expected, of_base = call(student, WIDE), call(base, WIDE)
    with Values():
        perturbed = call(base, WIDE)
        with pytest.raises(ec.RewriteError, match=r"blocks\.0\.attn is converted: what changes the result of scaled_dot_product_attention"):
            call(student, WIDE)
        with ec.teacher(student):
            assert torch.equal(call(student, WIDE), perturbed)
    assert not torch.equal(perturbed, of_base)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda query, key, value, mask=None, **options: value)
    with pytest.raises(ec.RewriteError, match=r"blocks\.0\.attn is converted"):
        call(student, WIDE)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", kernel_by_hand)
    with torch.device("cpu"), BaseTorchFunctionMode():
        torch.testing.assert_close(call(student, WIDE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inside", [False, True])
def test_what_changes_attention_is_refused_in_compiled_blocks_too(base, student, inside):
    """As diffusers' hook enters its mode: around the attention alone, inside of what is compiled."""
    expected = call(student, WIDE)
    for block in student.blocks:
        if inside:
            plain = block.attn.forward
            block.attn.forward = lambda *args, plain=plain, **options: perturbed(plain, args, options)
        block.compile(backend="eager", dynamic=True)
    refused = pytest.raises((ec.RewriteError, torch._dynamo.exc.Unsupported), match=r"blocks\.0\.attn is converted|RewriteError")
    with contextlib.nullcontext() if inside else Values(), refused:
        call(student, WIDE)
    if not inside:
        with torch.device("cpu"):
            torch.testing.assert_close(call(student, WIDE), expected, atol=1e-4, rtol=1e-4)


def perturbed(forward, args, options):
    with Values():
        return forward(*args, **options)


def test_generators_that_hold_a_teacher_leave_nothing_behind(student):
    expected = call(student, WIDE)

    def samples():
        with ec.teacher(student):
            yield
            yield

    one, other = samples(), samples()
    next(one), next(other)
    one.close()
    next(other)
    thread = threading.Thread(target=other.close)  # as where the garbage collector runs in another thread
    thread.start()
    thread.join()
    assert torch.equal(call(student, WIDE), expected)


def test_teachers_of_threads_overlap_and_no_other_thread_sees_them(base, student):
    expected, taught = call(student, WIDE), call(base, WIDE)
    barriers = [threading.Barrier(2) for _ in range(3)]
    seen = {}

    def run(name, enters, leaves):
        for step, barrier in enumerate(barriers):
            if step == enters:
                block = ec.teacher(student)
                block.__enter__()
            if step == leaves:
                block.__exit__(None, None, None)
            barrier.wait(20)
            seen[name, step] = call(student, WIDE)

    threads = [threading.Thread(target=run, args=each) for each in (("a", 0, 1), ("b", 0, 2))]
    [thread.start() for thread in threads]
    assert torch.equal(call(student, WIDE), expected)
    [thread.join() for thread in threads]
    is_taught = {key: torch.equal(output, taught) for key, output in seen.items()}
    assert is_taught == {("a", 0): True, ("b", 0): True, ("a", 1): False, ("b", 1): True, ("a", 2): False, ("b", 2): False}
    assert torch.equal(call(student, WIDE), expected)


def test_teachers_of_an_unshared_student_leave_other_threads_its_own_weights(base, student, often_switched):
    ec.unshare(student)
    toy.shaken(student, seed=3, amount=0.05)
    expected, taught = call(student, WIDE), call(base, WIDE)

    def serve(taught_too):
        with ec.teacher(student) if taught_too else contextlib.nullcontext():
            return sum(not torch.equal(call(student, WIDE), taught if taught_too else expected) for _ in range(FORWARDS // 2))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(serve, [False, True, True])) == [0, 0, 0]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["hook of a block", "hook of the model", "grid"])
def test_a_forward_that_fails_leaves_nothing_behind(student, kind, where):
    def fail(*args):
        raise kind

    if where == "grid":
        with ec.grid(student, 1, 1), pytest.raises(ec.GridError):
            student(**WIDE)
    else:
        handle = (student if where == "hook of the model" else student.blocks[1]).register_forward_pre_hook(fail)
        with pytest.raises(kind), ec.teacher(student):
            student(**WIDE)
        handle.remove()
    no_grid_is_known(student)


def no_grid_is_known(student):
    with pytest.raises(ec.GridError, match=r"blocks\.0\.attn ran outside the model's forward"):
        student.blocks[0](torch.zeros(2, 24, 24), torch.zeros(2, TEXT, 24), None, None)


def test_a_block_called_after_forward_or_backward_knows_no_grid(student):
    output = student(**WIDE)
    no_grid_is_known(student)
    output.sum().backward()
    no_grid_is_known(student)
    student.gradient_checkpointing = True
    student(**WIDE).sum().backward()
    no_grid_is_known(student)


def test_a_backward_pass_that_fails_leaves_nothing_behind(student):
    student.gradient_checkpointing = True

    def fail(gradient):
        raise ValueError

    handle = student.blocks[0].register_forward_hook(lambda module, args, output: output[0].register_hook(fail) and None)
    with pytest.raises(ValueError, match=r"^$"):
        student(**WIDE).sum().backward()
    handle.remove()
    no_grid_is_known(student)
    student(**TALL).sum().backward()
    no_grid_is_known(student)


def gradients_of(student, run):
    student.zero_grad()
    run()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again_have_the_grid_and_the_mode_of_their_own_forward(student, monkeypatch, compiled, reentrant):
    """Backward passes come in another order than the forwards, two at once, and outside of the teacher's block."""
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **options: original(*args, use_reentrant=reentrant))

    def run():
        wide, tall, wide_again = (student(**{**inputs, "x": inputs["x"].clone().requires_grad_()}) for inputs in (WIDE, TALL, WIDE))
        with ec.teacher(student):
            taught = student(**{**TALL, "x": TALL["x"].clone().requires_grad_()})
        with ec.grid(student, 6, 4):
            stated = student(**{**TALL, "x": TALL["x"].clone().requires_grad_()})
        tall.square().mean().backward()
        (wide.square().mean() * taught.square().mean() + stated.square().mean()).backward()
        wide_again.square().mean().backward()

    student.out.weight.requires_grad_(True)  # where the teacher's gradient is seen
    without = gradients_of(student, run)
    student.gradient_checkpointing = True
    torch._dynamo.reset()
    if compiled:
        ec.compile(student, backend="eager")
    with_it = gradients_of(student, run)
    torch._dynamo.reset()
    assert without.keys() == with_it.keys()
    # A first forward without gradients runs other kernels, of the same values but for rounding. Some gradients are nothing else.
    rounding = 1e-7 * max(gradient.abs().max().item() for gradient in without.values())
    for name, gradient in without.items():
        torch.testing.assert_close(with_it[name], gradient, atol=rounding, rtol=1e-4)
    if not compiled:
        no_grid_is_known(student)


def test_a_forward_within_a_backward_pass_has_its_own_grid(student):
    student.gradient_checkpointing = True
    expected, found = call(student, TALL), []
    without = gradients_of(student, lambda: student(**WIDE).square().mean().backward())

    def hook(module, args, output):
        if torch.is_grad_enabled():
            output[0].register_hook(lambda gradient: found.append(call(student, TALL)))

    handle = student.blocks[1].register_forward_hook(hook)
    with_it = gradients_of(student, lambda: student(**WIDE).square().mean().backward())
    handle.remove()
    assert found
    assert all(torch.equal(each, expected) for each in found)
    assert all(torch.equal(with_it[name], gradient) for name, gradient in without.items())


def test_captured_outputs_are_the_calls_of_this_thread_and_nothing_keeps_them(student):
    student.gradient_checkpointing = True
    with captured(student) as features:
        thread = threading.Thread(target=call, args=(student, TALL))
        thread.start()
        thread.join()
        output = student(**WIDE)
    assert {path: [tuple(t.shape) for t in tensors] for path, tensors in features.items()} == {
        f"blocks.{i}.attn": [(2, 24 + TEXT, 24)] for i in range(2)
    }
    (output.mean() + sum(t.mean() for tensors in features.values() for t in tensors)).backward()
    watched = weakref.ref(features["blocks.0.attn"][0])
    del features, output
    gc.collect()
    assert watched() is None


def test_a_copy_made_inside_a_block_forgets_it_when_the_block_is_left(student):
    expected = call(student, WIDE)
    with ec.teacher(student):
        twin = copy.deepcopy(student)
        assert not torch.equal(call(twin, WIDE), expected)
    assert torch.equal(call(twin, WIDE), expected)
    with ec.teacher(twin):
        assert torch.equal(call(student, WIDE), expected)
