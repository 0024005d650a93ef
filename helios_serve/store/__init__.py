"""What survives the process: jobs, chunks and leases in SQLite or Postgres, blobs in a directory or a bucket.

`connect.open_stores` opens all of it. Knows no engine, worker, tensor or protocol.
"""
