"""The mode of modules during generation."""

from torch import nn

from audiolm_pytorch.nn.module_state import eval_mode


def test_modules_stay_in_eval_mode_until_the_last_thread_leaves() -> None:
    """The blocks of two threads can overlap; afterwards every module has its own mode."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    module[1].eval()
    first, second = eval_mode(module), eval_mode(module[0])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module.training and not module[0].training
    second.__exit__(None, None, None)
    assert [part.training for part in module.modules()] == [True, True, False]
