"""What a finished job made: its first three completions, its speed, and where the Parquet lies.

python jobs/show.py runs/quickstart
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq


def main() -> None:
    output = Path(sys.argv[1])
    completions = pq.read_table(output / "completions").sort_by("row_index").to_pylist()
    for row in completions[:3]:
        print(f"\n[{row['row_id']}] {row.get('prompt', '')}\n  -> {(row['completion'] or '').strip()}")
    run = pq.read_table(output / "_metrics.parquet").to_pylist()[-1]
    print(
        f"\n{run['rows_succeeded']} of {run['rows_total']} rows succeeded, {run['completion_tokens']:,} tokens at "
        f"{run['output_tokens_per_second']:,.0f} output tokens per second"
    )
    print(f"The completions are in {output / 'completions'}, the metrics in {output / '_metrics.parquet'}")


if __name__ == "__main__":
    main()
