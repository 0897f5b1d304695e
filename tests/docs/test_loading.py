"""Each sentence of the page on loading has a test, and these tests exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from toys.command_line import CommandLine
from toys.manual import MANUAL, ROOT
from toys.runs import finished

TESTS = ROOT / "tests"

# Advice, and sentences that only introduce the next ones.
PROSE = ()

CHECKPOINT, EXTERNAL = "checkpoints/test_checkpoint.py", "checkpoints/test_external_weights.py"
INITIAL = "checkpoints/test_initial_weights.py"
PROGRAMS, DIRECTORIES = "checkpoints/test_external_programs.py", "runs/test_run_directories.py"
RESUME, RERUN, SWEEP = "runs/test_resume.py", "runs/test_rerun.py", "sweeps/test_sweep.py"
FILES, FUZZ = "report/test_files.py", "runs/test_damaged_runs.py"
TRANSFER, OWN = "attacks/test_transfer.py", "config/test_own_components.py"
COMPARE, EXPORT = "cli/test_compare_command.py", "export/test_formats.py"
DOWNLOADS, OLD = "data/test_torchvision.py", "runs/test_old_runs.py"

# The beginning of each sentence of the page, and the tests that prove it.
PROVEN: dict[str, tuple[str, ...]] = {
    "A checkpoint can come from somebody else": PROSE,
    "`checkpoint=RUN`, `load_model(RUN)`, `defense.teacher": (
        f"{CHECKPOINT}::test_a_loaded_model_computes_what_was_saved",
        f"{RESUME}::test_a_truncated_checkpoint_is_replaced_by_the_previous_one",
    ),
    "**Check sums** of the file are verified": (
        f"{CHECKPOINT}::test_damaged_weights_are_refused_or_whole",
        f"{CHECKPOINT}::test_no_flipped_bit_of_the_directory_changes_the_weights",
    ),
    "**Weights** are read with": (f"{CHECKPOINT}::test_foreign_files_are_refused",),
    "Only tensors and plain containers": (f"{CHECKPOINT}::test_foreign_files_are_refused",),
    "Reading runs no code": (f"{CHECKPOINT}::test_foreign_files_are_refused",),
    "**The configuration** in the file names": PROSE,
    "That must be a data set, a model": (
        f"{CHECKPOINT}::test_a_configuration_builds_only_classes_of_the_project",
        f"{CHECKPOINT}::test_a_package_that_is_trusted_may_build",
        f"{CHECKPOINT}::test_a_function_of_a_trusted_package_may_build",
    ),
    "`trust=[mypackage]` on the command line": (
        f"{OWN}::test_a_model_by_a_function_is_trained_and_loaded_with_trust",
    ),
    "A name such as `robusttrain.config.build.instantiate`": (
        f"{CHECKPOINT}::test_other_names_in_a_trusted_package_may_not",
        f"{CHECKPOINT}::test_a_configuration_builds_only_classes_of_the_project",
    ),
    "So are functions of robusttrain": (f"{CHECKPOINT}::test_functions_of_robusttrain_may_not",),
    "It loads the other run by the same rules": (
        f"{CHECKPOINT}::test_another_run_is_loaded_with_the_trust_of_the_caller",
        f"{CHECKPOINT}::test_a_configuration_cannot_extend_the_trust",
    ),
    "**References** in the configuration": (
        f"{DIRECTORIES}::test_secrets_of_the_environment_are_not_written",
    ),
    "Other resolvers of OmegaConf": (f"{CHECKPOINT}::test_no_reference_leads_around_that",),
    "**Weights are loaded** into": (f"{CHECKPOINT}::test_a_loaded_model_computes_what_was_saved",),
    "If names or shapes differ": (
        f"{CHECKPOINT}::test_weights_of_another_model_are_refused_in_a_line",
        f"{EXTERNAL}::test_a_refused_state_dict_changes_nothing",
    ),
    "`trust` allows a package": (f"{CHECKPOINT}::test_a_function_of_a_trusted_package_may_build",),
    "Name only packages that do no harm": PROSE,
    "`checkpoint=pretrained:NAME` reads a": (
        "checkpoints/test_pretrained.py::test_another_file_under_the_name_is_refused",
        "checkpoints/test_pretrained.py::test_a_name_stands_wherever_a_run_can_be_named",
    ),
    "Checkpoints of earlier versions can be read": (f"{OLD}::test_its_model_is_loaded",),
    "`resume=RUN` takes its command from": (
        f"{RESUME}::test_the_command_of_a_run_is_restored",
        f"{RERUN}::test_a_run_is_repeated_from_its_manifest_alone",
    ),
    "From both, a run takes": PROSE,
    "options of groups, and values of keys": (
        f"{RESUME}::test_a_saved_command_runs_nothing_without_consent",
    ),
    "A `_target_` must be a component": (
        f"{RESUME}::test_a_saved_command_runs_nothing_without_consent",
    ),
    "`robusttrain resume=RUN 'trust=[mypackage]'`": (
        f"{RESUME}::test_a_saved_command_does_not_say_what_to_trust",
    ),
    "What the file itself trusts does not count": (
        f"{RESUME}::test_a_saved_command_does_not_say_what_to_trust",
    ),
    "no option of Hydra except": (f"{RESUME}::test_a_saved_command_runs_nothing_without_consent",),
    "Others could run code": PROSE,
    "They need your consent": PROSE,
    "`robusttrain resume=RUN 'trust=[code]'`": (
        f"{RESUME}::test_a_saved_command_runs_nothing_without_consent",
        f"{RESUME}::test_the_advice_to_resume_has_the_trust_that_is_needed",
    ),
    "`resume=auto` takes the command that you type": (
        f"{RESUME}::test_what_the_user_types_needs_no_consent",
    ),
    "The record of a job in a sweep restores": (
        "sweeps/test_records.py::test_a_record_restores_files_of_its_own_job_only",
    ),
    "If a file that a run or a sweep would write": (
        f"{DIRECTORIES}::test_links_out_of_the_directory_are_refused",
        f"{DIRECTORIES}::test_links_out_of_a_sweep_are_refused",
    ),
    "So is a second command": (
        f"{DIRECTORIES}::test_a_second_command_leaves_the_run_in_progress_alone",
    ),
    "A run that is resumed takes a `best.pt`": (
        f"{RESUME}::test_weights_of_another_training_are_refused",
        "evaluation/test_cache.py::test_pieces_that_were_exchanged_are_made_again",
    ),
    "`manifest.json` is written last": (
        f"{DIRECTORIES}::test_the_manifest_has_the_digests_of_all_results",
    ),
    "Before a reader uses a file": PROSE,
    "A file of another run, or an edited one": (
        f"{DIRECTORIES}::test_readers_refuse_a_file_of_another_run",
        f"{FUZZ}::test_a_damaged_run_is_read_as_it_was_or_refused",
    ),
    "| reader |": PROSE,
    "| `robusttrain compare`, `evaluation.baseline": (
        f"{DIRECTORIES}::test_readers_refuse_a_file_of_another_run",
        f"{DIRECTORIES}::test_compare_refuses_an_evaluation_of_another_run",
    ),
    "| a sweep that is continued": (
        f"{SWEEP}::test_exchanged_results_are_refused_before_any_job",
    ),
    "| `robusttrain rerun`": (f"{DIRECTORIES}::test_readers_refuse_a_file_of_another_run",),
    "| `checkpoint=RUN`": (f"{DIRECTORIES}::test_readers_refuse_a_file_of_another_run",),
    "Readers also refuse a directory": (
        f"{DIRECTORIES}::test_readers_refuse_files_of_several_runs",
    ),
    "In a sweep, the manifest of a job": (
        f"{SWEEP}::test_exchanged_results_are_refused_before_any_job",
    ),
    "**A run of an earlier version**": (
        f"{DIRECTORIES}::test_readers_warn_about_runs_of_earlier_versions",
    ),
    "It is read, with a warning": (f"{DIRECTORIES}::test_the_warning_is_one_line",),
    "**A run without a manifest** is": PROSE,
    "`compare` reads it": (f"{COMPARE}::test_a_run_without_a_manifest_is_a_warning",),
    "`resume=RUN` writes the results": (
        f"{DIRECTORIES}::test_a_resumed_run_adopts_no_files_of_another",
    ),
    "**A file that you name**": (f"{DIRECTORIES}::test_a_file_that_is_named_is_read_as_it_is",),
    "Digests show": PROSE,
    "They do not show": PROSE,
    "`checkpoint=FILE` recognises": (
        f"{EXTERNAL}::test_common_files_are_named",
        f"{EXTERNAL}::test_a_checkpoint_of_robusttrain_is_recognised",
    ),
    "| file |": PROSE,
    "| a file of safetensors": (f"{INITIAL}::test_safetensors_are_read_by_content_and_by_name",),
    "| a state dict": (f"{EXTERNAL}::test_a_state_dict_is_found_wherever_scripts_put_it",),
    "| a pickle with any other object": (
        f"{EXTERNAL}::test_files_without_a_model_are_refused_in_a_line",
    ),
    "| TorchScript": (f"{PROGRAMS}::test_a_program_computes_what_its_author_wrote",),
    "| a program of": (f"{PROGRAMS}::test_a_program_computes_what_its_author_wrote",),
    "| a graph of ONNX": (
        f"{EXPORT}::test_a_program_is_read_back_with_the_gradients_of_the_network",
        f"{EXPORT}::test_onnx_needs_no_trust_since_it_has_no_code",
    ),
    "A TorchScript file or an exported program": (
        f"{PROGRAMS}::test_a_program_needs_consent",
        f"{TRANSFER}::test_a_program_is_a_source",
    ),
    "In a run directory only checkpoints": (
        f"{PROGRAMS}::test_in_a_run_directory_no_program_is_read",
    ),
    "There is no sandbox": PROSE,
    "Pickles of whole modules": (
        f"{EXTERNAL}::test_files_without_a_model_are_refused_in_a_line",
    ),
    "Save the state dict": PROSE,
    "`model.weights=FILE` reads the same": (
        f"{INITIAL}::test_prefixes_of_wrappers_are_removed",
        f"{INITIAL}::test_a_program_is_refused",
    ),
    "It reads a pickle with a whole module": (f"{INITIAL}::test_a_pickled_module_needs_consent",),
    "With `model.weights=default`, torchvision": (
        f"{INITIAL}::test_default_weights_come_with_their_normalisation",
        f"{INITIAL}::test_a_download_that_fails_is_one_message",
    ),
    "Files are written under a temporary name": (
        f"{FILES}::test_a_reader_sees_the_old_content_until_the_new_one_is_whole",
        f"{FILES}::test_writers_are_all_or_nothing",
        f"{CHECKPOINT}::test_a_failed_save_leaves_the_last_one",
    ),
    "A run writes only to its own directory": (
        "docs/test_loading.py::test_a_run_writes_to_its_own_directory_only",
        f"{FUZZ}::test_a_damaged_run_is_read_as_it_was_or_refused",
    ),
    "Only data sets are downloaded": (
        f"{DOWNLOADS}::test_missing_files_are_downloaded",
        f"{DOWNLOADS}::test_missing_data_without_download_says_what_to_do",
    ),
    "References to environment variables": (
        f"{DIRECTORIES}::test_secrets_of_the_environment_are_not_written",
    ),
    "Names with control characters": (
        "report/test_terminal.py::test_control_characters_are_shown_as_text",
        f"{FILES}::test_no_cell_is_a_formula",
    ),
    "`manifest.json` contains": (
        "cli/test_cli.py::test_the_manifest_describes_the_run",
    ),
    "Check it before you publish": PROSE,
}  # fmt: skip


def sentences(text: str) -> list[str]:
    """The sentences of a page without headings; items of lists and rows of tables stand alone."""
    text = re.sub(r"^#.*$|^\|[-|]+\|$", "", text, flags=re.M)
    blocks = [
        re.sub(r"^(\d\.|-) ", "", " ".join(block.split()))
        for block in re.split(r"\n\s*\n|\n(?=\d\. |- |\|)", text)
    ]
    found = []
    for block in filter(None, blocks):
        # A sentence ends with a dot or a colon, also at the end of bold text.
        parts = re.split(r"(?<=[.:])(?:\*\*)?\s+(?=[A-Z`*])", block)
        found += [block] if block.startswith("|") else parts
    return found


@cache
def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_sentence_of_the_page_has_its_test() -> None:
    found = sentences((MANUAL / "loading.md").read_text())
    for sentence in found:
        assert sum(sentence.startswith(begin) for begin in PROVEN) == 1, sentence
    for begin in PROVEN:
        assert any(sentence.startswith(begin) for sentence in found), begin


@pytest.mark.parametrize("test", sorted({test for tests in PROVEN.values() for test in tests}))
def test_the_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    assert name in defined_in(TESTS / path)


def test_a_run_writes_to_its_own_directory_only(command_line: CommandLine, tmp_path: Path) -> None:
    words = [
        "dataset=synthetic", "model=linear", "epochs=1", "device=cpu", "evaluation=quick",
        "evaluation.samples=20", "hydra.run.dir=here/run",
    ]  # fmt: skip
    finished(command_line.start(*words, cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["run"]
