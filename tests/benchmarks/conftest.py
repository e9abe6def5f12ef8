"""PyTorch beside other tests: its threads wait for each other by spinning, which takes minutes, so it gets one."""

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, and the same random numbers each time; nothing where PyTorch, an extra, is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
