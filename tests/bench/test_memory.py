"""Peak memory, counted: small calls of which it is known."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.nn.functional as F

from edit_compile.bench import peak_memory

KIB = 1024
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def made(device, kib=1):
    return torch.empty(kib * KIB, dtype=torch.int8, device=device)


@DEVICES
def test_what_has_ended_does_not_count(device):
    def call():
        for _ in range(3):
            a = made(device)
            b = made(device, 2)
            del a, b
        made(device)

    assert peak_memory(call) == 3 * KIB


@DEVICES
def test_views_and_writes_need_nothing(device):
    before = made(device)

    def call():
        a = made(device)
        a.view(2, -1).t().add_(1)
        a[:5].zero_()
        before.view(4, -1).mul_(2)
        before[3:].copy_(a[3:])

    assert peak_memory(call) == KIB


@DEVICES
def test_what_the_backward_pass_needs_is_kept_and_its_gradients_count(device):
    rows, columns = 64, 16
    weight = torch.ones(columns, columns, device=device, requires_grad=True)
    x = torch.ones(rows, columns, device=device)

    def call():
        y = (x @ weight).exp()  # the product ends, the result is kept
        z = y.sin()  # keeps y
        z.backward(torch.ones_like(z))

    size = 4 * rows * columns
    assert peak_memory(call) == 5 * size  # y, z, the ones, cos y, and their product
    assert weight.grad is not None


def test_the_meta_device_counts_as_the_cpu():
    def call(device):
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 8)).to(device)
        model(torch.ones(50, 8, device=device)).square().sum().backward()

    assert peak_memory(lambda: call("meta")) == pytest.approx(peak_memory(lambda: call("cpu")), rel=0.05)


def test_attention_is_as_it_was_after_counts_in_two_threads():
    """One that begins while another runs, and ends after it."""
    own, begun = F.scaled_dot_product_attention, threading.Event()

    def first() -> None:
        peak_memory(lambda: (begun.set(), time.sleep(0.2)))

    def second() -> None:
        begun.wait()
        peak_memory(lambda: time.sleep(0.4))

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.scaled_dot_product_attention is own
