"""Writes the Grafana dashboard: make_dashboard.py > keepset.json.

One list of rows and panels; layout, data source and the instance filter are added here. A test runs every
expression against a server and compares keepset.json with what this prints.
"""

import json
import sys

DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
PANEL_WIDTH = 8
PANEL_HEIGHT = 8
GRID_WIDTH = 24
I = '{instance=~"$instance"}'
RATE = "[$__rate_interval]"


def rate(name: str, by: str = "", labels: str = "") -> str:
    """Sum of per-second rates over the chosen instances."""
    selector = '{instance=~"$instance"' + (f",{labels}" if labels else "") + "}"
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({name}{selector}{RATE}))"


def quantile(q: float, histogram: str, by: str = "") -> str:
    grouping = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', grouping)})"


def panel(title: str, queries: dict[str, str], unit: str = "short", kind: str = "timeseries",
          description: str = "", instant: bool = False) -> dict:
    """queries: legend to expression."""
    return {
        "title": title,
        "type": kind,
        "description": description,
        "datasource": DATA_SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"cellHeight": "sm"} if kind == "table" else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": DATA_SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
                "format": "table" if kind == "table" else
                          "heatmap" if kind == "heatmap" else "time_series",
            }
            for number, (legend, expression) in enumerate(queries.items())
        ],
    }


ROWS = [
    ("Operations", [
        panel("Operations by outcome", {
            "{{outcome}} {{reason}}": rate("keepset_compress_operations_total", "outcome, reason") + " > 0",
        }, "ops", description="An outcome kept_full is a successful answer; its reason says why."),
        panel("Operations by model", {
            "{{model}}": rate("keepset_model_operations_total", "model"),
        }, "ops", description="A model without an active table counts as other."),
        panel("Operations by policy", {
            "{{policy}}": rate("keepset_policy_operations_total", "policy") + " > 0",
        }, "ops"),
        panel("Tokens kept", {
            "all": f'{rate("keepset_retained_tokens_total")} / {rate("keepset_input_tokens_total")}',
            "{{model}}": f'{rate("keepset_model_retained_tokens_total", "model")} / '
                         f'{rate("keepset_model_input_tokens_total", "model")}',
        }, "percentunit", description="Share of tokens times layers that stayed."),
        panel("Kept fraction of an operation", {
            "{{le}}": rate("keepset_kept_fraction_bucket", "le"),
        }, "percentunit", "heatmap"),
        panel("KV bytes", {
            "before": rate("keepset_kv_input_bytes_total"),
            "after": rate("keepset_kv_retained_bytes_total"),
        }, "Bps"),
        panel("Stage times, median", {
            "{{stage}}": quantile(0.5, "keepset_compress_stage_duration_seconds", "stage"),
        }, "s"),
        panel("Stage times, 99th percentile", {
            "{{stage}}": quantile(0.99, "keepset_compress_stage_duration_seconds", "stage"),
        }, "s"),
        panel("Refused and defaulted", {
            "refused: {{reason}}": rate("keepset_rejected_total", "reason") + " > 0",
            "without {{input}}": rate("keepset_defaulted_inputs_total", "input") + " > 0",
        }, "ops", description="Requests refused before an operation began; operations decided with a default."),
    ]),
    ("Tables", [
        panel("Active tables", {
            "": f"keepset_table_info{I} == 1",
        }, kind="table", instant=True),
        panel("Age of active tables", {
            "{{instance}} {{name}} {{version}}":
                f"time() - keepset_table_created_timestamp_seconds{I} "
                f"and keepset_table_created_timestamp_seconds{I} > 0",
        }, "s", description="Since the table was compiled."),
        panel("Reloads in an hour", {
            "{{result}}": f"sum by (result) (increase(keepset_table_reloads_total{I}[1h]))",
        }),
        panel("Table sources", {
            "{{instance}} {{source}}": f"keepset_table_source_healthy{I} "
                                       f"and keepset_table_source_enabled{I} == 1",
        }, description="1: could be read at the last attempt."),
        panel("Since the source was last read", {
            "{{instance}} {{source}}":
                f"time() - keepset_table_source_last_sync_timestamp_seconds{I} "
                f"and keepset_table_source_enabled{I} == 1",
        }, "s"),
        panel("Failed reads of a source", {
            "{{source}}": rate("keepset_table_source_failures_total", "source") + " > 0",
        }, "ops"),
        panel("Risk bins: entropy", {
            "entropy bin {{entropy_bin}}": rate("keepset_risk_bin_operations_total", "entropy_bin") + " > 0",
        }, "ops", description="Which row of the table's grid operations fall into."),
        panel("Risk bins: perplexity", {
            "perplexity bin {{ppl_bin}}": rate("keepset_risk_bin_operations_total", "ppl_bin") + " > 0",
        }, "ops"),
        panel("Table sets published last", {
            "{{instance}}": f"time() - keepset_table_last_success_timestamp_seconds{I} "
                            f"and keepset_table_last_success_timestamp_seconds{I} > 0",
        }, "s", description="Time since the last change of the active set."),
    ]),
    ("Shadow table", [
        panel("Operations scored by a second table", {
            "{{result}}": rate("keepset_shadow_operations_total", "result"),
        }, "ops"),
        panel("Kept overlap", {
            "median": quantile(0.5, "keepset_shadow_kept_overlap"),
            "10th percentile": quantile(0.1, "keepset_shadow_kept_overlap"),
            "mean": f'{rate("keepset_shadow_kept_overlap_sum")} / {rate("keepset_shadow_kept_overlap_count")}',
        }, "percentunit", description="Share of what the active table kept that the shadow table keeps too."),
        panel("Would-be bytes", {
            "kept by the active table": rate("keepset_shadow_decided_bytes_total"),
            "kept by the shadow table": rate("keepset_shadow_would_be_bytes_total"),
        }, "Bps"),
        panel("Cost of the second opinion, 99th percentile", {
            "time": quantile(0.99, "keepset_shadow_duration_seconds"),
        }, "s"),
    ]),
    ("Sessions and memory", [
        panel("Sessions", {
            "{{instance}}": f"keepset_sessions{I}",
        }),
        panel("Ended sessions in an hour", {
            "{{reason}}": f"sum by (reason) (increase(keepset_sessions_ended_total{I}[1h]))",
        }, description="lease_expired: reaped without a sign of life."),
        panel("Region registrations refused", {
            "{{kind}}": rate("keepset_region_import_failures_total", "kind"),
        }, "ops"),
        panel("Regions", {
            "{{kind}}": f"sum by (kind) (keepset_regions{I})",
        }),
        panel("Region bytes", {
            "{{kind}}": f"sum by (kind) (keepset_region_bytes{I})",
            "{{kind}}, allocations on the device": f"sum by (kind) (keepset_device_memory_bytes{I}) > 0",
        }, "bytes"),
        panel("Memory of the server's own", {
            "{{kind}}": f"sum by (kind) (keepset_owned_region_bytes{I})",
            "{{kind}}, quarantined": f"sum by (kind) (keepset_quarantined_bytes{I}) > 0",
        }, "bytes"),
        panel("Device memory for operations", {
            "{{instance}} {{state}}": f"keepset_device_workspace_bytes{I}",
        }, "bytes"),
        panel("Quarantined regions", {
            "{{kind}}": f"sum by (kind) (keepset_quarantined_regions{I})",
        }),
        panel("Resident and locked memory", {
            "{{instance}} resident": f"keepset_process_resident_memory_bytes{I}",
            "{{instance}} locked": f"keepset_process_locked_memory_bytes{I}",
        }, "bytes"),
    ]),
    ("Limits", [
        panel("Queue", {
            "{{instance}} waiting": f"keepset_queue_depth{I}",
            "{{instance}} capacity": f"keepset_queue_capacity{I}",
            "{{instance}} in flight": f"keepset_operations_in_flight{I}",
            "{{instance}} layers that streams may send": f"keepset_credits_outstanding{I}",
        }),
        panel("File descriptors", {
            "{{instance}}": f"keepset_process_open_fds{I} / keepset_process_max_fds{I}",
        }, "percentunit"),
        panel("Memory mappings", {
            "{{instance}}": f"keepset_process_memory_mappings{I} / keepset_process_max_memory_mappings{I}",
        }, "percentunit"),
        panel("Locked memory limit", {
            "{{instance}}": f"keepset_process_max_locked_memory_bytes{I}",
        }, "bytes"),
        panel("Versions", {
            "": f"keepset_build_info{I}",
        }, kind="table", instant=True),
    ]),
]


def layout() -> list[dict]:
    panels, y, number = [], 0, 1
    for title, row in ROWS:
        panels.append({"id": number, "type": "row", "title": title, "collapsed": False,
                       "gridPos": {"x": 0, "y": y, "w": GRID_WIDTH, "h": 1}, "panels": []})
        number += 1
        y += 1
        columns = GRID_WIDTH // PANEL_WIDTH
        for position, one in enumerate(row):
            place = {"x": position % columns * PANEL_WIDTH, "y": y + position // columns * PANEL_HEIGHT,
                     "w": PANEL_WIDTH, "h": PANEL_HEIGHT}
            panels.append({"id": number, "gridPos": place, **one})
            number += 1
        y += -(-len(row) // columns) * PANEL_HEIGHT
    return panels


def dashboard() -> dict:
    return {
        "uid": "keepset",
        "title": "Keepset",
        "tags": ["keepset"],
        "schemaVersion": 38,
        "editable": True,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                {
                    "name": "instance",
                    "type": "query",
                    "label": "Instance",
                    "datasource": DATA_SOURCE,
                    "query": {"query": "label_values(keepset_build_info, instance)", "refId": "instances"},
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": layout(),
    }


def main() -> None:
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
