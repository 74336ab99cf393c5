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
    COUNT_KEYS = "SELECT COUNT(*) AS count FROM keys WHERE tenant = $1";

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

    NOTE_DENIAL = "INSERT INTO kek_denials (kek, seq, heard_at) \
        VALUES ($1, (SELECT COALESCE(MAX(seq), 0) + 1 FROM kek_denials), $2) \
        ON CONFLICT (kek) DO UPDATE SET seq = excluded.seq, heard_at = excluded.heard_at \
        RETURNING kek, seq, heard_at";
    FORGET_DENIALS = "DELETE FROM kek_denials WHERE heard_at < $1 AND seq < $2";
    DENIALS = "SELECT kek, seq, heard_at FROM kek_denials WHERE seq > $1 ORDER BY seq";

    INSERT_API_KEY = "INSERT INTO api_keys (id, name, secret_hash, verbs, created_at, expires_at, revoked_at) \
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    INSERT_API_KEY_TENANT = "INSERT INTO api_key_tenants (api_key, tenant) VALUES ($1, $2)";
    REVOKE_API_KEY = "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, $2) WHERE id = $1";
    RELEASE_API_KEY = "DELETE FROM api_key_tenants WHERE api_key = $1 AND tenant = $2";
    // Has the trigger tell who remembers it.
    TOUCH_API_KEY = "UPDATE api_keys SET revoked_at = revoked_at WHERE id = $1";
    COUNT_API_KEYS = "SELECT COUNT(*) AS count FROM api_key_tenants h JOIN api_keys held ON held.id = h.api_key \
        WHERE h.tenant = $1 AND held.revoked_at IS NULL AND (held.expires_at IS NULL OR held.expires_at > $2)";
    API_KEY = select_api_keys!("(SELECT * FROM api_keys WHERE id = $1)");
    API_KEYS = select_api_keys!("(SELECT * FROM api_keys WHERE id > $1 ORDER BY id LIMIT $2)");
    API_KEYS_OF_TENANT = select_api_keys!("(SELECT held.* FROM api_key_tenants h \
        JOIN api_keys held ON held.id = h.api_key \
        WHERE h.tenant = $1 AND h.api_key > $2 ORDER BY h.api_key LIMIT $3)");

    INSERT_GRANT = "INSERT INTO grants (id, tenant, principal, verbs, scope, created_at, created_by) \
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    GRANTS = "SELECT id, tenant, principal, verbs, scope, created_at, created_by FROM grants \
        WHERE id > $1 ORDER BY id LIMIT $2";
    GRANTS_OF_TENANT = "SELECT id, tenant, principal, verbs, scope, created_at, created_by FROM grants \
        WHERE tenant = $1 AND id > $2 ORDER BY id LIMIT $3";
    COUNT_GRANTS = "SELECT COUNT(*) AS count FROM grants WHERE tenant = $1";
    DELETE_GRANT = "DELETE FROM grants WHERE tenant = $1 AND id = $2";

    // A tenant that is new or has changed is due at once.
    NUDGE_SWEEP = "INSERT INTO sweeps (tenant, due_at) VALUES ($1, $2) ON CONFLICT (tenant) DO UPDATE SET \
        due_at = CASE WHEN sweeps.due_at < excluded.due_at THEN sweeps.due_at ELSE excluded.due_at END, \
        nudges = sweeps.nudges + 1";
    NUDGE_SWEEPS_OF_KEK = "UPDATE sweeps SET due_at = CASE WHEN due_at < $2 THEN due_at ELSE $2 END, \
        nudges = nudges + 1 \
        WHERE tenant IN (SELECT tenant FROM tenant_keks WHERE kek = $1 AND membership = 'ring')";
    DUE_SWEEPS = "SELECT tenant, due_at, nudges, failures, last_error, swept_at, full_at, basis, checked_through \
        FROM sweeps WHERE due_at <= $1 ORDER BY due_at, tenant LIMIT $2";
    SWEEP = "SELECT tenant, due_at, nudges, failures, last_error, swept_at, full_at, basis, checked_through \
        FROM sweeps WHERE tenant = $1";
    SWEPT = "UPDATE sweeps SET due_at = CASE WHEN nudges = $2 THEN $3 ELSE due_at END, failures = $4, \
        last_error = $5, swept_at = $6, full_at = $7, basis = $8, checked_through = $9 WHERE tenant = $1";

    LEASE = "SELECT holder, token, expires_at FROM leases WHERE name = $1";
    INSERT_LEASE = "INSERT INTO leases (name, holder, token, expires_at) VALUES ($1, $2, 1, $3)";
    UPDATE_LEASE = "UPDATE leases SET holder = $2, token = $3, expires_at = $4 WHERE name = $1";
    RELEASE_LEASE = "UPDATE leases SET expires_at = $3 WHERE name = $1 AND token = $2 AND expires_at > $3";

    ACTIVE_DEKS = select_deks!("(SELECT * FROM deks WHERE tenant = $1 AND key_name = $2 AND bound_context > $3 \
        AND state = 'active' ORDER BY bound_context LIMIT $4)");
    DEKS_UNDER_KEK = select_deks!("(SELECT held.* FROM wrapped_forms f JOIN deks held ON held.id = f.dek \
        WHERE f.kek = $1 AND f.dek > $2 ORDER BY f.dek LIMIT $3)");
    KEK_FORMS = "SELECT COUNT(*) AS deks, MIN(wrapped_at) AS oldest FROM wrapped_forms WHERE kek = $1";
    KEK_RINGS = "SELECT COUNT(*) AS rings FROM tenant_keks WHERE kek = $1 AND membership = $2";
    KEK_MATERIAL = "SELECT kek, material, since FROM kek_materials WHERE kek = $1";
    PUT_KEK_MATERIAL = "INSERT INTO kek_materials (kek, material, since) VALUES ($1, $2, $3) \
        ON CONFLICT (kek) DO UPDATE SET material = excluded.material, since = excluded.since";

    INSERT_SHRED = "INSERT INTO shreds (tenant, target, requested_at, requested_by, due_at, done_at) \
        VALUES ($1, $2, $3, $4, $5, $6)";
    SHRED = "SELECT tenant, target, requested_at, requested_by, due_at, done_at FROM shreds \
        WHERE tenant = $1 AND target = $2";
    SHREDS = "SELECT tenant, target, requested_at, requested_by, due_at, done_at FROM shreds \
        WHERE tenant = $1 AND target > $2 ORDER BY target LIMIT $3";
    // '' is the first of all targets, so the first page begins below it.
    SHREDS_FIRST = "SELECT tenant, target, requested_at, requested_by, due_at, done_at FROM shreds \
        WHERE tenant = $1 ORDER BY target LIMIT $2";
    DUE_SHREDS = "SELECT tenant, target, requested_at, requested_by, due_at, done_at FROM shreds \
        WHERE done_at IS NULL AND due_at <= $1 ORDER BY due_at, tenant, target LIMIT $2";
    DELETE_SHRED = "DELETE FROM shreds WHERE tenant = $1 AND target = $2";
    SHRED_DONE = "UPDATE shreds SET done_at = $3 WHERE tenant = $1 AND target = $2 AND done_at IS NULL";
    DISABLE_TENANT = "UPDATE tenants SET status = 'disabled', updated_at = $2, version = version + 1 WHERE id = $1";
    DISABLE_KEY = "UPDATE keys SET status = 'disabled', updated_at = $3, version = version + 1 \
        WHERE tenant = $1 AND name = $2";
    DEK_PLACE = "SELECT tenant, key_name, state FROM deks WHERE id = $1";

    INSERT_JOB = "INSERT INTO jobs (id, kind, tenant, target, state, total, done, errors, last_error, created_at, \
        started_at, updated_at, finished_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)";
    UPDATE_JOB = "UPDATE jobs SET state = $2, total = $3, done = $4, errors = $5, last_error = $6, \
        started_at = $7, updated_at = $8, finished_at = $9 WHERE id = $1 AND finished_at IS NULL";
    OPEN_JOB = "SELECT * FROM jobs WHERE tenant = $1 AND kind = $2 AND target = $3 AND finished_at IS NULL";
    JOB = "SELECT * FROM jobs WHERE id = $1";
    JOBS = "SELECT * FROM jobs WHERE id < $1 ORDER BY id DESC LIMIT $2";
    JOBS_OF_TENANT = "SELECT * FROM jobs WHERE tenant = $1 AND id < $2 ORDER BY id DESC LIMIT $3";
}
