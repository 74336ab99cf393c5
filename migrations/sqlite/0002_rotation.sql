-- Rotation: who may apply it, which tenants are due, what is to be shredded, and how far the work has come.
--
-- Conventions as in 0001. The target of a job or a shred is '' for the whole tenant, 'key:NAME' or 'dek:UUID'.

-- One holder at a time. The token grows with every new holder; a change that names an older one is refused, however
-- long its author has slept.
CREATE TABLE leases (
    name       TEXT    NOT NULL PRIMARY KEY,
    holder     TEXT    NOT NULL,
    token      INTEGER NOT NULL CHECK (token >= 1),
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- When each tenant is to be looked at next. `nudges` counts the reasons to look sooner, so that one that comes while
-- the tenant is being looked at is not lost.
CREATE TABLE sweeps (
    tenant          TEXT    NOT NULL PRIMARY KEY REFERENCES tenants (id),
    due_at          INTEGER NOT NULL,
    nudges          INTEGER NOT NULL DEFAULT 0,
    failures        INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    last_error      TEXT,
    swept_at        INTEGER,
    -- When all data keys were last looked at, against which ring and materials, and up to which data key.
    full_at         INTEGER,
    basis           TEXT,
    checked_through TEXT
) STRICT, WITHOUT ROWID;

CREATE INDEX sweeps_by_due ON sweeps (due_at, tenant);

INSERT INTO sweeps (tenant, due_at) SELECT id, 0 FROM tenants;

-- Which material a KEK had when it was last asked, and since when it is known to have it.
CREATE TABLE kek_materials (
    kek      TEXT    NOT NULL PRIMARY KEY CHECK (length(kek) BETWEEN 1 AND 256),
    material TEXT    NOT NULL,
    since    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What is to be destroyed, and from when on. A row that is done stays: what was shredded is not served again.
CREATE TABLE shreds (
    tenant       TEXT    NOT NULL REFERENCES tenants (id),
    target       TEXT    NOT NULL,
    requested_at INTEGER NOT NULL,
    requested_by TEXT    NOT NULL,
    due_at       INTEGER NOT NULL,
    done_at      INTEGER,
    PRIMARY KEY (tenant, target)
) STRICT, WITHOUT ROWID;

CREATE INDEX shreds_by_due ON shreds (due_at, tenant, target) WHERE done_at IS NULL;

CREATE TABLE jobs (
    -- A UUIDv7 as text: order of ids is order of making.
    id          TEXT    NOT NULL PRIMARY KEY CHECK (length(id) = 36),
    kind        TEXT    NOT NULL CHECK (kind IN ('rewrap-keys', 'shred')),
    tenant      TEXT    NOT NULL REFERENCES tenants (id),
    target      TEXT    NOT NULL,
    state       TEXT    NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'cancelled')),
    total       INTEGER NOT NULL CHECK (total >= 0),
    done        INTEGER NOT NULL CHECK (done >= 0),
    errors      INTEGER NOT NULL CHECK (errors >= 0),
    last_error  TEXT,
    created_at  INTEGER NOT NULL,
    started_at  INTEGER,
    updated_at  INTEGER NOT NULL,
    finished_at INTEGER,
    CHECK ((state IN ('done', 'cancelled')) = (finished_at IS NOT NULL))
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX jobs_one_open ON jobs (tenant, kind, target) WHERE finished_at IS NULL;
CREATE INDEX jobs_by_tenant ON jobs (tenant, id);
