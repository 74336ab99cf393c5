//! Every statement of the registry, in one place.
//!
//! They keep to what SQLite and PostgreSQL have in common (`$1`, `ON CONFLICT`, `COALESCE`, no functions of one
//! engine), so that both run the same text. A record and what belongs to it are read in one statement: one statement
//! sees one state of the database, so no reader can meet a data key without its wrapped forms.
//!
//! Paging is `id > $1` with the lowest value (empty text, the nil id) for the first page: a form that either engine
//! answers from an index, where `$1 IS NULL OR id > $1` would read from the start again for each page.

macro_rules! statements {
    ($($name:ident = $sql:expr;)*) => {
        $(pub(super) const $name: &str = $sql;)*

        /// All of them by name, so that a test can prepare each.
        #[cfg(test)]
        pub(super) const ALL: &[(&str, &str)] = &[$((stringify!($name), $name)),*];
    };
}

macro_rules! select_tenants {
    ($from:literal) => {
        concat!(
            "SELECT t.id, t.status, t.created_at, t.updated_at, t.version, \
             k.membership, k.kek, k.role_arn, k.external_id \
             FROM ",
            $from,
            " t LEFT JOIN tenant_keks k ON k.tenant = t.id ORDER BY t.id, k.membership, k.position"
        )
    };
}

macro_rules! select_deks {
    ($from:literal) => {
        concat!(
            "SELECT d.id, d.tenant, d.key_name, d.bound_context, d.state, d.created_at, d.activated_at, \
             d.retired_at, d.revoked_at, d.destroyed_at, d.messages, d.bytes, d.last_sealed_at, d.last_opened_at, \
             w.kek, w.blob, w.material, w.wrapped_at \
             FROM ",
            $from,
            " d LEFT JOIN wrapped_forms w ON w.dek = d.id ORDER BY d.id, w.kek"
        )
    };
}

macro_rules! select_api_keys {
    ($from:literal) => {
        concat!(
            "SELECT a.id, a.name, a.secret_hash, a.verbs, a.created_at, a.expires_at, a.revoked_at, t.tenant \
             FROM ",
            $from,
            " a LEFT JOIN api_key_tenants t ON t.api_key = a.id ORDER BY a.id, t.tenant"
        )
    };
}

statements! {
    PING = "SELECT id FROM tenants LIMIT 1";

    INSERT_TENANT = "INSERT INTO tenants (id, status, created_at, updated_at, version) VALUES ($1, $2, $3, $4, 1)";
    INSERT_TENANT_KEK = "INSERT INTO tenant_keks (tenant, membership, position, kek, role_arn, external_id) \
        VALUES ($1, $2, $3, $4, $5, $6)";
    DELETE_TENANT_KEKS = "DELETE FROM tenant_keks WHERE tenant = $1";
    UPDATE_TENANT = "UPDATE tenants SET status = $3, updated_at = $4, version = version + 1 \
        WHERE id = $1 AND version = $2";
    TENANT_VERSION = "SELECT version FROM tenants WHERE id = $1";
    TENANT = select_tenants!("(SELECT * FROM tenants WHERE id = $1)");
    TENANTS = select_tenants!("(SELECT * FROM tenants WHERE id > $1 ORDER BY id LIMIT $2)");

    INSERT_KEY = "INSERT INTO keys (tenant, name, status, dek_age_secs_max, dek_messages_max, dek_bytes_max, \
        envelope, created_at, updated_at, version) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 1)";
    UPDATE_KEY = "UPDATE keys SET status = $4, dek_age_secs_max = $5, dek_messages_max = $6, dek_bytes_max = $7, \
        envelope = $8, updated_at = $9, version = version + 1 WHERE tenant = $1 AND name = $2 AND version = $3";
    KEY_VERSION = "SELECT version FROM keys WHERE tenant = $1 AND name = $2";
    KEY = "SELECT tenant, name, status, dek_age_secs_max, dek_messages_max, dek_bytes_max, envelope, created_at, \
        updated_at, version FROM keys WHERE tenant = $1 AND name = $2";
    KEYS = "SELECT tenant, name, status, dek_age_secs_max, dek_messages_max, dek_bytes_max, envelope, created_at, \
        updated_at, version FROM keys WHERE tenant = $1 AND name > $2 ORDER BY name LIMIT $3";

    INSERT_DEK = "INSERT INTO deks (id, tenant, key_name, bound_context, state, created_at, activated_at, \
        retired_at, revoked_at, destroyed_at, messages, bytes, last_sealed_at, last_opened_at) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)";
    // The state stands in the text of these two, and not as a parameter: else the partial index cannot serve them.
    ACTIVE_DEK_ID = "SELECT id FROM deks \
        WHERE tenant = $1 AND key_name = $2 AND bound_context = $3 AND state = 'active'";
    NEXT_DEK_ID = "SELECT id FROM deks \
        WHERE tenant = $1 AND key_name = $2 AND bound_context = $3 AND state = 'next'";
    BOUND_SCOPES = "SELECT COUNT(*) FROM deks WHERE tenant = $1 AND bound_context <> $2 AND state = 'active'";
    DEK_STATE = "SELECT state FROM deks WHERE id = $1";
    // What stops being active stops encrypting, whatever it becomes; what is taken back is not revoked any more.
    MOVE_DEK = "UPDATE deks SET state = $3, \
        activated_at = CASE WHEN $3 = 'active' THEN COALESCE(activated_at, $4) ELSE activated_at END, \
        retired_at = CASE WHEN $3 = 'retired' OR state = 'active' THEN COALESCE(retired_at, $4) \
            ELSE retired_at END, \
        revoked_at = CASE WHEN $3 = 'revoked' THEN $4 WHEN $3 = 'destroyed' THEN revoked_at ELSE NULL END, \
        destroyed_at = CASE WHEN $3 = 'destroyed' THEN $4 ELSE destroyed_at END \
        WHERE id = $1 AND state = $2";
    ADD_USAGE = "UPDATE deks SET \
        messages = CASE WHEN messages > 9223372036854775807 - $2 THEN 9223372036854775807 ELSE messages + $2 END, \
        bytes = CASE WHEN bytes > 9223372036854775807 - $3 THEN 9223372036854775807 ELSE bytes + $3 END, \
        last_sealed_at = CASE WHEN last_sealed_at IS NULL OR last_sealed_at < $4 THEN $4 ELSE last_sealed_at END, \
        last_opened_at = CASE WHEN last_opened_at IS NULL OR last_opened_at < $5 THEN $5 ELSE last_opened_at END \
        WHERE id = $1";
    ACTIVE_DEK = select_deks!("(SELECT * FROM deks \
        WHERE tenant = $1 AND key_name = $2 AND bound_context = $3 AND state = 'active')");
    NEXT_DEK = select_deks!("(SELECT * FROM deks \
        WHERE tenant = $1 AND key_name = $2 AND bound_context = $3 AND state = 'next')");
    DEK = select_deks!("(SELECT * FROM deks WHERE id = $1)");
    DEKS = select_deks!("(SELECT * FROM deks WHERE tenant = $1 AND key_name = $2 AND id > $3 ORDER BY id LIMIT $4)");

    PUT_WRAPPED = "INSERT INTO wrapped_forms (dek, kek, blob, material, wrapped_at) VALUES ($1, $2, $3, $4, $5) \
        ON CONFLICT (dek, kek) DO UPDATE SET \
        blob = excluded.blob, material = excluded.material, wrapped_at = excluded.wrapped_at";
    OTHER_WRAPPED = "SELECT kek FROM wrapped_forms WHERE dek = $1 AND kek <> $2 LIMIT 1";
    DELETE_WRAPPED = "DELETE FROM wrapped_forms WHERE dek = $1 AND kek = $2";
    DELETE_ALL_WRAPPED = "DELETE FROM wrapped_forms WHERE dek = $1";

    CHANGES = "SELECT tenant, seq FROM changes WHERE seq > $1 ORDER BY seq";

    INSERT_API_KEY = "INSERT INTO api_keys (id, name, secret_hash, verbs, created_at, expires_at, revoked_at) \
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    INSERT_API_KEY_TENANT = "INSERT INTO api_key_tenants (api_key, tenant) VALUES ($1, $2)";
    REVOKE_API_KEY = "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, $2) WHERE id = $1";
    API_KEY = select_api_keys!("(SELECT * FROM api_keys WHERE id = $1)");
    API_KEYS = select_api_keys!("(SELECT * FROM api_keys WHERE id > $1 ORDER BY id LIMIT $2)");
    API_KEYS_OF_TENANT = select_api_keys!("(SELECT held.* FROM api_key_tenants h \
        JOIN api_keys held ON held.id = h.api_key \
        WHERE h.tenant = $1 AND h.api_key > $2 ORDER BY h.api_key LIMIT $3)");
}
