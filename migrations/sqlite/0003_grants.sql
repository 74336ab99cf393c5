-- Grants: what principals hold in a tenant beside what their credential and the configuration give.
--
-- Conventions as in 0001. A row is never changed: a grant is made, and deleted.

CREATE TABLE grants (
    -- A UUIDv7 as text: order of ids is order of making.
    id         TEXT    NOT NULL PRIMARY KEY CHECK (length(id) = 36),
    tenant     TEXT    NOT NULL REFERENCES tenants (id),
    -- A principal, or with a '*' at the end all that begin so.
    principal  TEXT    NOT NULL CHECK (length(principal) BETWEEN 1 AND 256),
    -- Names of verbs with commas between. 'operate' is of the service and of no tenant.
    verbs      TEXT    NOT NULL CHECK (length(verbs) > 0 AND verbs NOT LIKE '%operate%'),
    -- With what, as JSON: {"keys": [...] or null, "context": [{"name", "values"}]}.
    scope      TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    created_by TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX grants_by_tenant ON grants (tenant, id);

-- Credentials are what grants change the worth of, so they stand under no tenant, as API keys do.
CREATE TRIGGER grants_inserted AFTER INSERT ON grants BEGIN
    INSERT INTO changes (tenant, seq) VALUES ('', (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
CREATE TRIGGER grants_deleted AFTER DELETE ON grants BEGIN
    INSERT INTO changes (tenant, seq) VALUES ('', (SELECT COALESCE(MAX(seq), 0) + 1 FROM changes))
    ON CONFLICT (tenant) DO UPDATE SET seq = excluded.seq;
END;
