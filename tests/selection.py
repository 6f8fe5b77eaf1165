"""What `make test` leaves out and `make test-all` and `.ci/run` run: the one place that says so.

A test that is named here is marked `whole`, but for the parameters that stay. What stays is chosen so that

- every test file has a test that `make test` runs, and every engine (tests/test_selection.py looks at both);
- an engine meets each feature that has tests on all engines: freezing like one process, a drop, batches dealt by
  length, resuming from it and on it, Trainer, a mean over tokens;
- a feature's cases meet each other in pairs, not in all combinations: of sources and targets of a resume each is
  there once, of numbers of ranks and cases too;
- where nothing depends on the engine, a few of many stay: architectures, presets, pages, tricks.

What is named but not there any more fails tests/test_selection.py.
"""

from __future__ import annotations

NONE: tuple[str, ...] = ()

# File below tests/ -> test -> the parameters that `make test` runs; a * at an end stands for anything.
STAYS: dict[str, dict[str, tuple[str, ...]]] = {
    # On two ranks and on three each engine and each case, in one launch an engine.
    "engines/test_equivalence.py": {
        "test_two_ranks_equal_one_process": (
            "ddp-plain",
            "ddp-a group of matrices",
            "ddp-checkpointing, all layers",
            "zero1-clip, accumulation 3",
            "zero1-by quantile",
            "zero2-clip",
            "zero2-groups of A and of B",
            "zero2-by quantile",
            "zero3-plain",
            "zero3-clip, accumulation 3",
            "zero3-a group of matrices",
            "fsdp2-clip",
            "fsdp2-groups of A and of B",
            "fsdp2-checkpointing, all layers",
        ),
        "test_bfloat16_trains_and_freezes_the_same_on_both_ranks": ("ddp", "zero3"),
        "test_three_ranks_equal_one_process": (
            "ddp-clip",
            "zero2-a group of matrices",
            "zero3-by quantile",
        ),
        "test_four_ranks_equal_one_process": NONE,
    },
    "engines/test_dealing.py": {
        "test_dealt_batches_train_what_undealt_ones_train": (
            "single-1",
            "ddp-2",
            "zero1-3",
            "zero2-2",
            "zero3-2",
            "fsdp2-2",
        ),
    },
    # Every engine, and most kinds once; each engine goes on from the one before it.
    "engines/test_freeze_anything.py": {
        "test_ranks_freeze_what_one_process_does": (
            "ddp-lora",
            "ddp-by pattern",
            "zero1-momentum",
            "zero2-means",
            "zero2-one block of deberta",
            "zero2-prefix",
            "zero3-full",
            "zero3-experts",
            "zero3-prefix of all",
            "fsdp2-one block, recomputed",
            "fsdp2-prefix",
            "fsdp2-beside a reference",
        ),
        "test_an_engine_goes_on_where_another_one_was_cut": (
            "single-means",
            "ddp-means",
            "zero1-prefix of all",
            "zero2-momentum",
            "zero3-fallen",
            "fsdp2-prefix of all",
        ),
        "test_what_is_frozen_stays_and_a_snapshot_goes_on_to_the_bit": (
            "single-full",
            "ddp-lora",
            "zero1-momentum",
            "zero2-prefix",
            "zero3-prefix of all",
            "fsdp2-random",
        ),
        "test_below_the_first_block_that_trains_nothing_is_kept_and_nothing_runs_backward": (
            "single-one block of deberta",
            "ddp-one block",
            "zero2-one block of deberta",
            "zero3-one block",
            "fsdp2-one block, recomputed",
        ),
        "test_between_decisions_nothing_is_sent_and_only_elements_scores_are_kept": ("zero2", "fsdp2"),
    },
    "engines/test_drop.py": {  # beside what looks at every engine after a drop
        "test_half_of_a_model_freezes_in_the_memory_of_a_step": ("zero2",),
        "test_a_freeze_moves_only_what_changes_its_owner": ("zero2",),
        "test_a_freeze_needs_no_more_memory_than_a_step": ("zero2",),
        "test_accelerate_s_own_checkpoint_holds_the_freezing": ("ddp-head",),
    },
    # Each engine is once the source and once the target.
    "store/test_resume.py": {
        "test_any_engine_goes_on_from_any_other": (
            "single-ddp",
            "ddp-zero1",
            "zero1-zero2",
            "zero2-zero3",
            "zero3-fsdp2",
            "fsdp2-single",
        ),
        "test_half_precision_goes_on_to_the_bit": ("zero2-fp16",),
        "test_the_authors_recipe_goes_on_on_any_engine": NONE,
        "test_one_process_goes_on_to_the_bit_from_any_update": ("4", "12"),
        "test_a_wish_to_stop_saves_and_leaves_together": ("TERM to one rank",),
        "test_when_a_rank_is_killed_the_other_ends_with_a_message_and_resume_gives_the_same": ("1",),
        "test_a_rank_killed_under_the_launcher_ends_the_job_and_resume_gives_the_same": NONE,
        "test_a_short_campaign_of_kills": NONE,
    },
    "store/test_diverged.py": {
        "test_a_run_that_diverges_between_two_checkpoints_goes_on_from_the_finite_one_at_a_lower_rate": ("single",),
    },
    # The freeze log and the saved adapter on each engine, for which both are made at once.
    "test_trainer.py": {
        "test_the_best_model_comes_back_though_matrices_froze_since": ("single", "zero2"),
        "test_resuming_is_exact_before_between_and_after_the_freezes": ("single",),
        "test_lora_freezes_with_its_lowest_blocks_as_on_one_process": ("single", "ddp"),
        "test_lora_goes_on_in_the_middle_of_a_prefix": NONE,
        "test_an_out_of_memory_is_retried_whenever_it_comes": NONE,
        "test_a_checkpoint_that_cannot_be_gone_on_from_says_why": NONE,
        "test_one_process_resumes_from_a_sharded_checkpoint": ("fsdp2",),
        "test_a_signal_to_one_rank_has_all_save_and_leave_after_the_same_update": ("single", "ddp"),
        "test_resuming_with_deepspeed_s_own_optimizer_and_schedule_is_exact": ("zero1-*",),
        "test_the_same_trainer_resumes_from_before_its_freezes_and_trains_again": ("single",),
        "test_a_compiled_model_freezes_the_same": NONE,
    },
    # Each kind, and one engine that leaves gradients whole and one that shards them.
    "test_trl.py": {
        "test_sft_freezes_as_an_own_loop_does": ("single", "zero3"),
        "test_preferences_and_rewards_freeze_the_same_on_every_engine": ("single-dpo", "ddp-reward"),
        "test_all_freezes_and_the_whole_adapter_is_saved": ("single-sft", "ddp-reward"),
        "test_resuming_is_exact": ("single-sft",),
        "test_sft_of_lora_freezes_as_trainer_does": ("single",),
    },
    "test_saving.py": {"test_what_the_pages_save_is_all_that_was_trained": ("cpu", "zero3")},
    "test_control.py": {
        "test_what_goes_wrong_on_one_rank_ends_all_with_the_reason": ("on_freeze", "PowerSGD"),
        "test_fp16_scores_are_unscaled_and_an_overflow_moves_only_the_clock": ("zero2",),
        "test_ranks_that_disagree_end_with_an_error_on_every_rank": ("decision",),
    },
    "test_examples.py": {
        "test_an_own_loop": ("single-1", "ddp-2"),
        "test_trl": NONE,
        "test_several_adapters": NONE,
        "test_the_main_job_and_what_others_make_of_its_adapter": NONE,
    },
    # The launcher reads each file: here one without ranks, one that starts real processes, the two unlike others.
    "training/test_main_job.py": {
        "test_the_launch_configurations_give_the_results_of_one_process_on_a_cpu": (
            "cpu",
            "zero2",
        ),
        "test_activation_checkpointing_of_fsdp2_changes_no_name": NONE,
    },
    "training/test_sft.py": {
        "test_the_loss_is_the_mean_over_the_global_batch_s_tokens": (
            "single-1",
            "ddp-3",
            "zero1-2",
            "zero2-2",
            "zero3-2",
            "fsdp2-2",
        ),
        "test_half_precision_trains_alike_and_goes_on_to_the_bit": NONE,
    },
    "training/test_best_epoch.py": {
        "test_the_adapter_is_the_best_epoch_s_after_a_restart_too": ("single",),
    },
    "training/test_updates.py": {"test_all_of_it_at_once_resumes_to_the_bit": ("single",)},
    "training/test_hub_runs.py": {
        "test_every_engine_and_precision_trains_what_float32_trains": ("single-bf16",),
        "test_every_preset_trains_on_the_layout_that_it_names": ("official/stsb",),
        "test_a_run_over_pickles_in_float16_is_planned_merged_and_made_lora": ("glue/rte",),
    },
    "training/test_errors.py": {
        "test_every_rank_ends_and_one_speaks": NONE,
        "test_lonely_processes_are_noticed": NONE,
        "test_a_full_disk_of_the_main_process_ends_every_rank_with_the_reason": NONE,
    },
    "training/test_launching.py": {"test_nothing_is_lost_when_a_rank_leaves": NONE},
    "training/test_slurm.py": {  # one job stays
        "test_an_array_of_seeds_is_collected_into_a_table": NONE,
        "test_a_job_interrupted_in_three_ways_comes_back_and_ends_with_the_same_model": NONE,
        "test_several_tasks_a_node_are_so_many_ranks_and_a_port_in_use_is_passed_over": NONE,
        "test_a_script_of_one_s_own_runs_on_all_nodes_and_comes_back": NONE,
    },
    "test_meeting.py": {
        "test_ranks_that_are_started_anew_hear_nothing_of_what_those_before_them_said": NONE,
        "test_work_that_takes_longer_than_collectives_may_is_waited_for_and_its_error_is_everybody_s": NONE,
    },
    "test_compat.py": {"test_what_zero3_gathers_together_is_what_was_written": NONE},
    "engines/test_own_models.py": {
        "test_a_freezing_that_comes_to_its_end_within_another_s_step_disturbs_nobody": NONE,
    },
    "freezing/test_stays_frozen.py": {
        "test_a_second_training_after_a_switch_is_that_without_on_every_engine": ("ddp", "zero3"),
    },
    "methods/test_methods.py": {
        "test_methods_train_alike_on_two_ranks_and_go_on_in_one_process": NONE,
        "test_a_method_trains_saves_and_resumes_to_the_bit": ("lora", "full"),
        "test_a_language_model_is_trained_by_a_method_and_loads_again": ("lora",),
    },
    "study/test_work.py": {
        "test_a_study_that_is_killed_goes_on_and_ends_with_the_same_table": NONE,
        "test_an_array_of_jobs_shares_a_study_and_a_killed_one_is_made_up_for": NONE,
    },
    "study/test_page.py": {"test_the_page_is_what_the_committed_results_make_of_it": NONE},
    "test_peft_benchmark.py": {"test_it_trains_and_freezes_as_a_loop_with_accelerate": NONE},
    "serve/test_leaving.py": {"test_stock_libraries_compute_the_same_and_know_what_labels_are_called": NONE},
    # Each option of a study is said once in these two; the others say more of the same.
    "study/test_grid.py": {
        "test_every_shipped_study_is_one": ("paper's-fig5", "small-controls", "small-word_problems"),
        "test_committed_results_are_found_by_their_names": NONE,
    },
    "study/test_shipped.py": {"test_each_method_of_a_shipped_study_begins": ("word_problems",)},
    "test_plan.py": {
        "test_a_run_does_what_was_planned": ("single-no", "zero2-bf16"),
        "test_a_model_of_70_billion_parameters_is_planned_in_little_memory": NONE,
        "test_the_demos_language_model_is_planned_from_its_files_header": NONE,
        "test_a_dry_run_prints_the_plan_of_its_launch_once_and_writes_nothing": ("ddp",),
    },
    "test_profiling.py": {
        "test_bf16_works_on_the_default_model_and_says_whose_outputs_it_casts": NONE,
        "test_overhead_is_measured_on_two_ranks": NONE,
        "test_throughput_is_measured_on_two_ranks": NONE,
        "test_the_rest_of_peft_s_methods_train_what_they_should": NONE,
    },
    "tasks/test_on_hub.py": {
        "test_the_first_command_of_all_trains_what_the_hub_has_and_what_was_trained_goes_there": NONE,
        "test_an_adapter_of_the_hub_answers": NONE,
        "test_nodes_without_a_network_train_what_another_one_has_fetched": NONE,
    },
    "tasks/test_model.py": {"test_the_embedded_language_model_is_loaded_from_its_file": NONE},
    "gpu/test_command.py": {"test_the_main_job_of_a_deepspeed_section_trains_on_made_up_data": NONE},
    # TensorBoard, its plugin and a browser over a profiled run.
    "watch/test_telemetry.py": {
        "test_the_profiler_plugin_reads_both_ranks_all_ranges_and_data_loading": NONE,
        "test_a_browser_finds_scalars_fig5_summary_and_hparams": NONE,
        "test_scalars_and_hparams_say_what_the_run_directory_says": NONE,
    },
    "view/test_trace.py": {"test_a_real_run_reads_as_its_json_says": NONE},  # that run again
    "watch/test_trackers.py": {"test_a_tracker_has_one_run_with_all_that_the_run_directory_has": ("mlflow",)},
    "test_docs.py": {
        "test_the_site_holds_every_page_and_fetches_nothing": NONE,
        "test_its_search_finds_pages_where_there_is_no_server": NONE,
        "test_the_api_pages_say_what_the_docstrings_say": NONE,
        "test_every_cell_of_the_matrix_names_a_test_that_exists": NONE,
        "test_commands_run": ("CONTRIBUTING.md", "README.md", "install.md"),
        "test_python_runs": ("README.md",),
    },
    "test_extending.py": {"test_the_task": NONE, "test_the_engine": NONE},  # the score stays
    "test_install.py": {  # a training of the demo in an environment of its own
        "test_the_demo_trains_without_deepspeed": NONE,
        "test_a_run_is_shown_collected_and_exported_where_the_main_job_is_not_installed": NONE,
        "test_a_missing_extra_is_named_in_a_line_with_its_command": NONE,
    },
    "test_registration.py": {  # a new Python for each
        "test_a_saved_adapter_loads_when_the_package_is_imported": ("before PEFT",),
        "test_a_peft_that_cannot_be_imported_says_so_itself_and_is_waited_for_further": NONE,
    },
    "predict/test_predict.py": {
        "test_several_ranks_predict_the_same": ("zero3",),
        "test_other_methods_predict_as_they_were_measured": ("lora",),
    },
    "test_export.py": {
        "test_a_run_s_lora_computes_the_same_where_the_package_is_unknown": ("peft",),
        "test_a_language_model_s_lora_computes_the_same": ("transformers",),
        "test_tied_weights_are_merged_right": ("layers-dtype0", "adapted-head-dtype1", "both-dtype0"),
    },
    "test_hostile.py": {
        "test_no_command_is_tricked": (
            "code_beside_the_model",
            "pickles",
            "yaml_that_makes_objects",
            "links_to_a_secret",
            "a_pipe_for_base/config.json",
            "names_that_climb",
        ),
    },
    "view/test_light.py": {  # a new Python for each
        "test_help_and_wrong_options_are_found_without_heavy_packages": ("ImportError*",),
    },
    "adapter/test_architectures.py": {
        "test_every_architecture_of_transformers_is_found_or_refused_by_name": NONE,
        "test_every_block_layer_is_adapted_and_told_apart": ("bert", "deberta-v2", "gpt2", "llama", "mixtral", "t5"),
        "test_what_peft_adapts_by_default_is_among_what_is_adapted_here": ("bert", "gpt2", "llama", "t5"),
    },
    "engines/test_optimizers.py": {
        "test_an_optimizer_that_treats_each_element_by_itself_freezes_and_resumes_to_the_bit": (
            "AdamW",
            "AdamW, fused",
            "SGD with momentum",
            "Lion",
            "state in the param groups",
        ),
    },
    "adapter/test_peft_behaviours.py": {
        "test_saved_and_loaded_it_computes_the_same": ("*-bert", "*-llama"),
        **dict.fromkeys(
            (
                "test_merging_unloading_and_disabling",
                "test_several_adapters_at_once_add_up",
                "test_a_deleted_adapter_is_gone_and_its_name_is_free",
                "test_only_the_active_adapter_trains",
                "test_a_batch_may_mix_adapters",
                "test_init_weights_false_is_finite_seeded_and_changes_the_model",
                "test_peft_converts_it_to_lora",
                "test_modules_to_save_train_switch_and_are_saved",
                "test_copies_are_independent",
                "test_transformers_own_way_of_adding_saving_and_loading",
            ),
            ("bert", "llama"),
        ),
    },
    # Compiles C++; "one graph" below compiles the same layers without.
    "adapter/test_layer.py": {
        "test_torch_compile_takes_the_whole_model_in_one_graph_before_and_after_a_freeze": NONE,
    },
    "adapter/test_compile.py": {"test_forty_eight_freezes_compile_at_most_eight_times": ("one graph",)},
    "adapter/test_guard.py": {
        "test_compiled_training_is_refused_too_and_the_guard_compiles_nothing_anew": ("get_peft_model-dtype0",),
    },
}

COLLECTED: list[str] = []  # the tests that this pytest has found
CHOSEN: set[str] = set()  # and those of them that it runs


def stays(parameters: str, kept: tuple[str, ...]) -> bool:
    """Whether a test's parameters are among those that `make test` runs."""
    for one in kept:
        if one.endswith("*"):
            found = parameters.startswith(one[:-1])
        elif one.startswith("*"):
            found = parameters.endswith(one[1:])
        else:
            found = parameters == one
        if found:
            return True
    return False


def is_left_out(test: str) -> bool:
    """Whether `make test` leaves a test out, by its id."""
    file, _, rest = test.partition("::")
    name, _, parameters = rest.partition("[")
    kept = STAYS.get(file.removeprefix("tests/"), {}).get(name)
    return kept is not None and not stays(parameters.removesuffix("]"), kept)


def is_chosen(test: str) -> bool:
    """Whether this pytest runs a test: what several tests look at is made for those that are.

    Outside of pytest all are.
    """
    return not CHOSEN or test in CHOSEN
