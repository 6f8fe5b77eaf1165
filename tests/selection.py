"""What `make test` leaves out and `make test-all` and `.ci/run` run: the one place that says so.

A test that is named here is marked `whole`, but for the parameters that stay. What stays is chosen so that

- every test file has a test that `make test` runs, and every engine (tests/test_selection.py looks at both);
- an engine meets each feature that has a test on several engines: freezing like one process, a drop, dealing, resuming
  from it and on it, Trainer, TRL, saving, the main job, planning;
- a feature's cases meet each other in pairs, not in all combinations: of sources and targets of a resume each is
  there once, of numbers of ranks and cases too;
- what takes longest and depends on no engine (Slurm, the whole of an index of architectures) has its shortest test.

What is named but not there any more fails tests/test_selection.py.
"""

from __future__ import annotations

NONE: tuple[str, ...] = ()

# Test without its parameters -> the parameters that `make test` runs.
STAYS: dict[str, tuple[str, ...]] = {
    # Engines: on two ranks all cases of all engines, in one launch an engine; on three each engine and each case.
    "tests/engines/test_equivalence.py::test_three_ranks_equal_one_process": (
        "ddp-clip",
        "zero1-groups of A and of B",
        "zero2-a group of matrices",
        "zero3-by quantile",
        "fsdp2-clip",
    ),
    "tests/engines/test_equivalence.py::test_four_ranks_equal_one_process": ("fsdp2",),
    "tests/engines/test_dealing.py::test_dealt_batches_train_what_undealt_ones_train": (
        "single-1",
        "ddp-2",
        "zero1-3",
        "zero2-3",
        "zero3-3",
        "fsdp2-3",
    ),
    "tests/engines/test_drop.py::test_a_freeze_moves_only_what_changes_its_owner": ("zero1", "zero2", "fsdp2"),
    "tests/engines/test_drop.py::test_a_freeze_needs_no_more_memory_than_a_step": ("zero1", "zero2", "fsdp2"),
    "tests/engines/test_drop.py::test_accelerate_s_own_checkpoint_holds_the_freezing": (
        "ddp-head",
        "zero1-head",
        "zero3-ab",
        "fsdp2-head",
    ),
    # Resuming: each engine is once the source and once the target.
    "tests/store/test_resume.py::test_any_engine_goes_on_from_any_other": (
        "single-ddp",
        "ddp-zero1",
        "zero1-zero2",
        "zero2-zero3",
        "zero3-fsdp2",
        "fsdp2-single",
    ),
    "tests/store/test_resume.py::test_half_precision_goes_on_to_the_bit": ("zero2-fp16",),
    "tests/store/test_resume.py::test_the_authors_recipe_goes_on_on_any_engine": NONE,
    "tests/store/test_resume.py::test_one_process_goes_on_to_the_bit_from_any_update": ("4", "12"),
    "tests/store/test_resume.py::test_a_wish_to_stop_saves_and_leaves_together": ("TERM to one rank",),
    "tests/store/test_diverged.py::"
    "test_a_run_that_diverges_between_two_checkpoints_goes_on_from_the_finite_one_at_a_lower_rate": ("single",),
    # Trainer and TRL.
    "tests/test_trainer.py::test_resuming_is_exact_before_between_and_after_the_freezes": ("single", "zero3"),
    "tests/test_trainer.py::test_resuming_with_deepspeed_s_own_optimizer_and_schedule_is_exact": ("zero1-names0",),
    "tests/test_trainer.py::test_the_same_trainer_resumes_from_before_its_freezes_and_trains_again": (
        "single",
        "fsdp2",
    ),
    "tests/test_trl.py::test_sft_freezes_as_an_own_loop_does": ("single", "zero1", "zero3"),
    "tests/test_trl.py::test_preferences_and_rewards_freeze_the_same_on_every_engine": (
        "single-dpo",
        "single-reward",
        "ddp-reward",
        "fsdp2-dpo",
    ),
    "tests/test_trl.py::test_all_freezes_and_the_whole_adapter_is_saved": (
        "single-sft",
        "single-dpo",
        "zero1-sft",
        "zero2-grpo",
        "fsdp2-dpo",
    ),
    "tests/test_trl.py::test_resuming_is_exact": ("single-sft", "zero3-sft"),
    "tests/test_saving.py::test_what_the_pages_save_is_all_that_was_trained": ("cpu", "zero3", "fsdp2"),
    # The main job.
    "tests/training/test_main_job.py::test_the_launch_configurations_give_the_results_of_one_process_on_a_cpu": (
        "cpu",
        "zero2",
        "zero3_offload",
        "fsdp2",
    ),
    "tests/training/test_sft.py::test_the_loss_is_the_mean_over_the_global_batch_s_tokens": (
        "single-1",
        "ddp-3",
        "zero1-2",
        "zero2-3",
        "zero3-2",
        "fsdp2-3",
    ),
    "tests/training/test_sft.py::test_half_precision_trains_alike_and_goes_on_to_the_bit": ("zero3-bf16-bfloat16",),
    "tests/training/test_best_epoch.py::test_the_adapter_is_the_best_epoch_s_after_a_restart_too": (
        "single",
        "zero3",
    ),
    "tests/training/test_hub_runs.py::test_every_engine_and_precision_trains_what_float32_trains": (
        "single-bf16",
        "ddp-bf16",
        "zero3-no",
    ),
    "tests/training/test_slurm.py::test_a_job_interrupted_in_four_ways_comes_back_and_ends_with_the_same_model": NONE,
    "tests/training/test_slurm.py::test_several_tasks_a_node_are_so_many_ranks_and_a_port_in_use_is_passed_over": NONE,
    "tests/training/test_slurm.py::test_a_signal_to_the_ranks_saves_and_ends_the_job": NONE,
    "tests/methods/test_methods.py::test_methods_train_alike_on_two_ranks_and_go_on_in_one_process": (
        "ddp",
        "zero3",
    ),
    "tests/test_plan.py::test_a_run_does_what_was_planned": ("single-no", "zero1-no", "zero2-bf16", "fsdp2-no"),
    "tests/test_plan.py::test_freezes_send_what_was_planned": ("single", "ddp", "zero1", "zero3"),
    "tests/test_plan.py::test_a_dry_run_prints_the_plan_of_its_launch_once_and_writes_nothing": ("ddp", "zero3"),
    "tests/test_examples.py::test_an_own_loop": ("single-1", "ddp-2"),
}

COLLECTED: list[str] = []  # the tests that this pytest has found
CHOSEN: set[str] = set()  # and those of them that it runs


def is_left_out(test: str) -> bool:
    """Whether `make test` leaves a test out, by its id."""
    name, _, parameters = test.partition("[")
    return name in STAYS and parameters.removesuffix("]") not in STAYS[name]


def is_chosen(test: str) -> bool:
    """Whether this pytest runs a test: what several tests look at is made for those that are.

    Outside of pytest, and within tests that collect others, all are.
    """
    return not CHOSEN or test in CHOSEN
