-- The registry: tenants, their keys, data keys in wrapped form, API keys.
--
-- Never edited once released (its checksum is kept in the database): a change is a new file, with the same number
-- under migrations/sqlite and migrations/postgres.
--
-- Times are milliseconds since 1970-01-01T00:00:00Z. Counts are unsigned in the program and saturate here at
-- 9223372036854775807. Text is compared byte by byte (in PostgreSQL: COLLATE "C"), so that pages have one order
-- everywhere. No plaintext data key and no API key's secret has a column here, and none may get one.

CREATE TABLE tenants (
    id         TEXT    NOT NULL PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 63),
    status     TEXT    NOT NULL CHECK (status IN ('enabled', 'disabled')),
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    version    INTEGER NOT NULL CHECK (version >= 1)
) STRICT, WITHOUT ROWID;

-- The members of a tenant's ring, the primary at position 0, and those that were members before.
CREATE TABLE tenant_keks (
    tenant      TEXT    NOT NULL REFERENCES tenants (id),
    membership  TEXT    NOT NULL CHECK (membership IN ('ring', 'former')),
    position    INTEGER NOT NULL CHECK (position >= 0 AND (membership = 'former' OR position < 8)),
    kek         TEXT    NOT NULL CHECK (length(kek) BETWEEN 1 AND 256),
    role_arn    TEXT,
    external_id TEXT    CHECK (external_id IS NULL OR role_arn IS NOT NULL),
    PRIMARY KEY (tenant, membership, position)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX tenant_keks_once_in_a_ring ON tenant_keks (tenant, kek) WHERE membership = 'ring';

-- Which tenants does a KEK concern: when its owner denies it, and when it is to be retired.
CREATE INDEX tenant_keks_by_kek ON tenant_keks (kek, tenant);

CREATE TABLE keys (
    tenant           TEXT    NOT NULL REFERENCES tenants (id),
    name             TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 63),
    status           TEXT    NOT NULL CHECK (status IN ('enabled', 'disabled')),
    dek_age_secs_max INTEGER NOT NULL CHECK (dek_age_secs_max >= 0),
    dek_messages_max INTEGER NOT NULL CHECK (dek_messages_max >= 0),
    dek_bytes_max    INTEGER NOT NULL CHECK (dek_bytes_max >= 0),
    envelope         TEXT    NOT NULL CHECK (envelope IN ('embedded', 'compact')),
    created_at       INTEGER NOT NULL,
    updated_at       INTEGER NOT NULL,
    version          INTEGER NOT NULL CHECK (version >= 1),
    PRIMARY KEY (tenant, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE deks (
    -- A UUIDv7: order of ids is order of making. The nil id is where paging begins, so no data key has it.
    id             BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16 AND id <> zeroblob(16)),
    tenant         TEXT    NOT NULL,
    key_name       TEXT    NOT NULL,
    -- The canonical form of the key-bound encryption context; two bytes of zero where nothing is bound.
    bound_context  BLOB    NOT NULL CHECK (length(bound_context) BETWEEN 2 AND 8192),
    state          TEXT    NOT NULL,
    created_at     INTEGER NOT NULL,
    activated_at   INTEGER,
    retired_at     INTEGER,
    revoked_at     INTEGER,
    destroyed_at   INTEGER,
    messages       INTEGER NOT NULL CHECK (messages >= 0),
    bytes          INTEGER NOT NULL CHECK (bytes >= 0),
    last_sealed_at INTEGER,
    last_opened_at INTEGER,
    FOREIGN KEY (tenant, key_name) REFERENCES keys (tenant, name),
    -- A state comes with its time, and not with the time of a later one. (A data key that was retired or revoked
    -- while it waited was never active.)
    CHECK (
        CASE state
            WHEN 'next' THEN activated_at IS NULL AND retired_at IS NULL
                AND revoked_at IS NULL AND destroyed_at IS NULL
            WHEN 'active' THEN activated_at IS NOT NULL AND retired_at IS NULL
                AND revoked_at IS NULL AND destroyed_at IS NULL
            WHEN 'retired' THEN retired_at IS NOT NULL AND revoked_at IS NULL AND destroyed_at IS NULL
            WHEN 'revoked' THEN revoked_at IS NOT NULL AND destroyed_at IS NULL
            WHEN 'destroyed' THEN destroyed_at IS NOT NULL
            ELSE FALSE
        END
    )
) STRICT, WITHOUT ROWID;

-- One active data key for each scope, and one that waits: whatever several processes try at once.
CREATE UNIQUE INDEX deks_one_active ON deks (tenant, key_name, bound_context) WHERE state = 'active';
CREATE UNIQUE INDEX deks_one_next ON deks (tenant, key_name, bound_context) WHERE state = 'next';

CREATE INDEX deks_by_key ON deks (tenant, key_name, id);

-- For rotation: which data keys are active, which have been revoked.
CREATE INDEX deks_by_state ON deks (state, id);

CREATE TABLE wrapped_forms (
    dek        BLOB    NOT NULL REFERENCES deks (id),
    kek        TEXT    NOT NULL CHECK (length(kek) BETWEEN 1 AND 256),
    blob       BLOB    NOT NULL CHECK (length(blob) BETWEEN 1 AND 65535),
    material   TEXT,
    wrapped_at INTEGER NOT NULL,
    PRIMARY KEY (dek, kek)
) STRICT, WITHOUT ROWID;

-- For rotation: which data keys still need a KEK, and in which material, since when.
CREATE INDEX wrapped_forms_by_kek ON wrapped_forms (kek, dek, material, wrapped_at);

CREATE TABLE api_keys (
    id          TEXT    NOT NULL PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 64),
    name        TEXT    NOT NULL,
    -- HMAC-SHA-256 of the secret under a pepper that is not in this database.
    secret_hash BLOB    NOT NULL CHECK (length(secret_hash) = 32),
    -- Names of verbs with commas between, as encrypt,decrypt.
    verbs       TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER,
    revoked_at  INTEGER
) STRICT, WITHOUT ROWID;

CREATE TABLE api_key_tenants (
    api_key TEXT NOT NULL REFERENCES api_keys (id),
    tenant  TEXT NOT NULL REFERENCES tenants (id),
    PRIMARY KEY (api_key, tenant)
) STRICT, WITHOUT ROWID;

CREATE INDEX api_key_tenants_by_tenant ON api_key_tenants (tenant, api_key);

-- What processes that keep records in memory follow: for each tenant the number of its latest change; '' stands for
-- what belongs to no tenant (API keys). Written by triggers, so that no statement can forget it.
CREATE TABLE changes (
    tenant TEXT    NOT NULL PRIMARY KEY,
    seq    INTEGER NOT NULL UNIQUE
) STRICT, WITHOUT ROWID;

CREATE TRIGGER tenants_inserted AFTER INSERT ON tenants BEGIN
    INSERT INTO changes (tenant, seq) VALUES (NEW.id, (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER tenants_updated AFTER UPDATE ON tenants BEGIN
    INSERT INTO changes (tenant, seq) VALUES (NEW.id, (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER keys_inserted AFTER INSERT ON keys BEGIN
    INSERT INTO changes (tenant, seq) VALUES (NEW.tenant, (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER keys_updated AFTER UPDATE ON keys BEGIN
    INSERT INTO changes (tenant, seq) VALUES (NEW.tenant, (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER deks_moved AFTER UPDATE OF state ON deks BEGIN
    INSERT INTO changes (tenant, seq) VALUES (NEW.tenant, (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
-- The wrapped forms that a data key is made with are no change: nobody has it in memory yet.
CREATE TRIGGER wrapped_forms_added AFTER INSERT ON wrapped_forms
WHEN NEW.wrapped_at <> (SELECT created_at FROM deks WHERE id = NEW.dek) BEGIN
    INSERT INTO changes (tenant, seq)
    VALUES ((SELECT tenant FROM deks WHERE id = NEW.dek), (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER wrapped_forms_replaced AFTER UPDATE ON wrapped_forms BEGIN
    INSERT INTO changes (tenant, seq)
    VALUES ((SELECT tenant FROM deks WHERE id = NEW.dek), (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER wrapped_forms_removed AFTER DELETE ON wrapped_forms BEGIN
    INSERT INTO changes (tenant, seq)
    VALUES ((SELECT tenant FROM deks WHERE id = OLD.dek), (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER api_keys_inserted AFTER INSERT ON api_keys BEGIN
    INSERT INTO changes (tenant, seq) VALUES ('', (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER api_keys_updated AFTER UPDATE ON api_keys BEGIN
    INSERT INTO changes (tenant, seq) VALUES ('', (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
