import io

from rich.console import Console

from lora_jax.progress import bar


def test_a_bar_shows_its_name_its_task_how_far_it_is_and_its_note(monkeypatch):
    progress = bar("training")
    task = progress.add_task("steps", total=8, note="loss 1.25")
    progress.update(task, completed=3)
    shown = Console(file=io.StringIO(), width=120)
    shown.print(progress.get_renderable())
    line = shown.file.getvalue()
    for part in ("training", "steps", "3/8", "loss 1.25"):
        assert part in line


def test_progress_stays_off_standard_output(capsys):
    with bar("training") as progress:
        progress.add_task("steps", total=1, note="")
    assert capsys.readouterr().out == ""
