"""The tests with many cases that each convert and run a model, or that kill conversions, and the cases of them that `make test` keeps.

`make test` runs the named cases, one of each kind; `make slow` runs the others.
"""

from collections.abc import Mapping

KEPT: Mapping[str, tuple[str, ...]] = {
    "test_divergence.py::test_a_fault_in_a_layer_is_found_there": ("key's bias dropped", "an expert twice"),
    "test_divergence.py::test_a_fault_in_a_table_is_found_in_the_first_block": (),
    "test_divergence.py::test_a_fault_in_what_the_model_computes_is_found": ("<lambda>-heads0",),
    "test_divergence.py::test_no_step_and_no_part_of_a_clean_conversion_departs": ("gemma2-maxtext", "mixtral-flat"),
    "test_forwards.py::test_the_traced_module_thinks_as_the_source": ("llama-options1", "mixtral-options4"),
    "test_forwards.py::test_a_fault_is_seen_by_the_traced_module": ("qwen3",),
    "test_forwards.py::test_torch_holds_no_weights_and_the_arrays_stay_where_they_are": ("True",),
    "test_interop.py::test_a_model_in_jax_is_within_the_noise_of_torch": ("llama", "resnet18", "gemma2"),
    "test_interop.py::test_sharded_weights_and_none_in_torch": ("mixtral",),
    "test_kills.py::test_runs_that_are_killed_each_in_another_way_end_in_the_same_checkpoint": (),
    "test_kills.py::test_a_driver_that_is_killed_while_checkpoints_change_places": (),
    "test_logits.py::test_a_converted_model_thinks_as_its_source": ("maxtext-True",),
    "test_logits.py::test_a_fault_in_a_layouts_table_is_seen": ("query scale missing", "norm's 1 doubled", "local and global"),
    "test_logits.py::test_a_fault_in_an_array_is_seen": ("layers off by one", "not a number", "one part in ten thousand"),
    "test_logits.py::test_what_can_be_asked_of_a_layout": ("biased", "qwen3"),
    "test_logits.py::test_what_the_plan_rounds_is_told_from_faults": ("gemma2", "mixtral"),
    "test_load.py::test_each_process_reads_what_its_devices_need": ("2-host", "4-device"),
    "test_load.py::test_memory_is_the_arrays_and_the_budget": ("2-host",),
    "test_mesh_device.py::test_every_leaf_bit_for_bit_and_read_once": (
        "llama-maxtext-unscanned-both",
        "mixtral-flat-scanned-stages",
        "qwen3_moe-maxtext-scanned-rows",
        "gemma2-maxtext-scanned-columns",
        "qwen2-flat-scanned-copies",
    ),
    "test_mesh_host.py::test_every_leaf_bit_for_bit_and_read_once": ("maxtext-scanned", "flat-unscanned-both"),
    "test_memory.py::test_memory_is_the_budgets_and_not_the_models": ("maxtext",),
    "test_hostile_pickles.py::test_bombs_end_soon_and_in_little_memory": ("10^7 instructions in lists", "10^7 marks"),
    "test_pytorch_source.py::test_both_sides_think_the_same": (),
    "test_pytorch_source.py::test_rays_workers_read_pytorch_files": (),
    "test_pytorch_source.py::test_an_interrupted_run_goes_on": ("sharded",),
    "test_porting_examples.py::test_resnet": ("small",),
    "test_porting_examples.py::test_dinov3": ("two layers",),
    "test_porting_layers.py::test_a_layer_computes_what_torch_does": (
        *("Linear-", "Embedding", "Conv2d-", "Conv3d, groups", "circular", "dilated-linen", "k=4 s=2 p=1-", "Transpose2d, groups"),
        *("BatchNorm2d-", "LayerNorm-", "RMSNorm", "GroupNorm", "InstanceNorm", "MultiheadAttention-", "LSTM-linen]", "LSTM-nnx]"),
        *("LSTM-equinox", "GRU-", "gate-nnx", "weight_norm-linen", "weight_norm-equinox wrapped", "spectral_norm-linen", "PReLU"),
    ),
    "test_mesh_run.py::test_the_arrays_are_those_of_a_conversion_that_streams": ("maxtext-experts and stages-mesh-host",),
    "test_mesh_run.py::test_a_mesh_plan_is_done_by_workers_that_stream_to_the_same_bytes": (),
    "test_mesh_run.py::test_processes_that_die_too_often_are_a_report_and_the_next_run_goes_on": (),
    "test_mesh_run.py::test_a_process_that_hangs_is_named_and_all_are_started_again": (),
    "test_mesh_run.py::test_a_process_that_does_not_come_is_named": (),
    "test_mesh_run.py::test_windows_are_done_one_after_another_and_not_again": (),
    "test_mesh_run.py::test_memory_is_the_budgets_and_not_the_models": (),
    "test_mesh_slice.py::test_processes_are_the_hosts_of_the_slice_in_their_order": (),
    "test_mesh_slice.py::test_another_number_of_processes_is_refused": (),
    "test_ray.py::test_a_ray_that_dies_as_it_starts_is_a_report": (),
    "test_ray.py::test_a_ray_of_our_own_that_dies_is_a_report": ("raylet",),
}
