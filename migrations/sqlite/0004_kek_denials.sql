-- Denials: which KEK's owner has said no, told by the process that heard it to all others.
--
-- Conventions as in 0001. A row for each KEK, with its latest denial. Old rows are forgotten, but never the newest one:
-- the numbers only grow.

CREATE TABLE kek_denials (
    kek      TEXT    NOT NULL PRIMARY KEY CHECK (length(kek) BETWEEN 1 AND 256),
    seq      INTEGER NOT NULL UNIQUE,
    heard_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- For forgetting.
CREATE INDEX kek_denials_by_time ON kek_denials (heard_at);
